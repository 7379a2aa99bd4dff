"""Lightning callbacks: result files, tables, pictures, and resuming to the bit."""

from lightning.pytorch import Callback

from corrzoo.callbacks.compiling import Compile
from corrzoo.callbacks.finite import FiniteLoss
from corrzoo.callbacks.pictures import PICTURES, MatchImages
from corrzoo.callbacks.results import ResultsWriter, ScoreTable
from corrzoo.callbacks.resume import RandomState, StopSignals

__all__ = ["PICTURES", "MatchImages", "ResultsWriter", "ScoreTable", "default_callbacks"]


def default_callbacks() -> list[Callback]:
    """What every run has: the loss is checked, results and pictures are written, signals end it cleanly."""
    pictures = MatchImages(kinds=list(PICTURES), stages=["predict"])
    return [Compile(), FiniteLoss(), ResultsWriter(), pictures, StopSignals(), RandomState()]
