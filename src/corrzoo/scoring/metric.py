"""Base class of metrics: one int64 row per pair, so results are exact for any number of processes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torchmetrics
from torch import Tensor

from corrzoo.scoring.protocols import Protocol
from corrzoo.types import ZooError


class BenchmarkMetric(torchmetrics.Metric, ABC):
    """Scores of the pairs of a benchmark.

    A row starts with the pair's index and category. Rows are gathered over all processes, sorted by index, and each
    pair counts once. `compute()`, `rows()` and `breakdown()` are collective calls. Without pairs, they raise ZooError.

    Attributes:
        name: Name in tables.
        protocol: How pairs are scored.
        query: Image whose points or outline are given, `src` or `trg`.
        evaluated: Image in which they are predicted, `src` or `trg`.
    """

    full_state_update = False
    table: list[Tensor]
    name: ClassVar[str]
    protocol: Protocol | str
    query: str = "src"
    evaluated: str = "trg"

    def __init__(self, width: int, categories: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width, self.categories = width, tuple(categories)
        self.add_state("table", [], dist_reduce_fx="cat")

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Protocol, flaw, alphas and average, for result files."""

    @abstractmethod
    def columns(self) -> list[tuple[str, str, str]]:
        """Columns of a score table: heading, key in `breakdown()`, key in `compute()`."""

    @abstractmethod
    def _scores(self, table: Tensor) -> dict[str, Tensor]:
        """Scores by name, (N,) each, of N rows."""

    @property
    def key(self) -> str:
        """Name in result files, such as `pck`."""
        return self.name.lower().replace(" ", "_")

    def rows(self) -> list[dict[str, Any]]:
        """One dict per pair, sorted by index: `index`, `category` and scores."""
        with self.sync_context():
            table = self._distinct()
        scores = {name: column.tolist() for name, column in self._scores(table).items()}
        return [
            {"index": index, "category": self._category(category)}
            | {name: column[k] for name, column in scores.items()}
            for k, (index, category) in enumerate(table[:, :2].tolist())
        ]

    def breakdown(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean scores of groups of pairs: `{"category": {name: {"pairs": count, score: mean, ...}}}`."""
        with self.sync_context():
            return self._groups(self._distinct())

    def _groups(self, table: Tensor) -> dict[str, dict[str, dict[str, float]]]:
        column = table[:, 1]
        return {"category": {self._category(c): self._row(table[column == c]) for c in column.unique().tolist()}}

    def _row(self, table: Tensor) -> dict[str, float]:
        return {"pairs": len(table)} | {name: column.mean().item() for name, column in self._scores(table).items()}

    def _category(self, number: int) -> str:
        return self.categories[number] if self.categories else str(number)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes. torchmetrics calls this method."""
        if not len(self.table):  # without pairs, torchmetrics would send a float tensor of shape (0,)
            self.table = [torch.empty(0, self.width, dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def _distinct(self) -> Tensor:
        """(N, width) rows on the CPU, one per index.

        Distributed samplers repeat pairs. Sorting whole rows makes the result independent of who scored the repeats.
        """
        parts = [self.table] if isinstance(self.table, Tensor) else self.table
        if not sum(map(len, parts)):
            raise ZooError(f"{type(self).__name__} has no scored pairs: call update() with pairs that have keypoints")
        rows = torch.cat([part.cpu() for part in parts])
        rows = rows[rows[:, 0].argsort()]
        if (rows[:, 0].diff() == 0).any():
            rows = rows.unique(dim=0)  # slow, so only if pairs are repeated
        return rows[rows[:, 0].diff(prepend=rows[:1, 0] - 1) != 0]
