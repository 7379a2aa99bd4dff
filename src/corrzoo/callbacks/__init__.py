"""Lightning callbacks: result files, score tables, pictures, and exact resume."""

from lightning.pytorch import Callback

from corrzoo.callbacks.pictures import PICTURES, MatchImages
from corrzoo.callbacks.results import ResultsWriter, ScoreTable
from corrzoo.callbacks.resume import RandomState, StopSignals

__all__ = ["PICTURES", "MatchImages", "ResultsWriter", "ScoreTable", "default_callbacks"]


def default_callbacks() -> list[Callback]:
    """Callbacks of every run: result files, pictures of predictions, stop signals and the random state."""
    return [ResultsWriter(), MatchImages(kinds=list(PICTURES), stages=["predict"]), StopSignals(), RandomState()]
