"""Lightning callbacks: result files, score tables, pictures, and exact resume."""

from lightning.pytorch import Callback

from corrzoo.callbacks.compiling import Compile
from corrzoo.callbacks.finite import FiniteLoss
from corrzoo.callbacks.pictures import PICTURES, MatchImages
from corrzoo.callbacks.results import ResultsWriter, ScoreTable
from corrzoo.callbacks.resume import ExactResume
from corrzoo.callbacks.signals import StopSignals

__all__ = ["PICTURES", "MatchImages", "ResultsWriter", "ScoreTable", "default_callbacks"]


def default_callbacks() -> list[Callback]:
    """Callbacks of every run: compilation, finite-loss check, result files, pictures, stop signals, exact resume."""
    pictures = MatchImages(kinds=list(PICTURES), stages=["predict"])
    return [Compile(), FiniteLoss(), ResultsWriter(), pictures, StopSignals(), ExactResume()]
