"""Scoring: PCK protocols, PCK and label transfer of a benchmark, and the evaluation of a model."""

from corrzoo.scoring.label_transfer import LabelTransfer
from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.scoring.pck import PCK, correct_points, score
from corrzoo.scoring.protocols import get_protocol, list_protocols

__all__ = ["PCK", "BenchmarkMetric", "LabelTransfer", "correct_points", "get_protocol", "list_protocols", "score"]
