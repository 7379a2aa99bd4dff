"""The metric of a benchmark: int64 rows by pair index, exact over any number of processes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torchmetrics
from torch import Tensor

from corrzoo.scoring.protocols import Protocol
from corrzoo.types import ZooError


class BenchmarkMetric(torchmetrics.Metric, ABC):
    """What the pairs of a benchmark are scored by: `PCK`, or `LabelTransfer` where outlines are annotated.

    Pairs are int64 rows that start with index and category: collected over processes, each pair counted once, in index
    order. `compute()`, `rows()` and `breakdown()` are to be called by every process, give each the result over all, and
    raise when nothing was scored.

    Attributes:
        name: How tables name it; result files write it in lower case, with an underscore.
        protocol: How it scores.
        query: The image whose points or outline are given.
        evaluated: The other, where they are predicted.
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
        """How it scores, for a result file."""

    @abstractmethod
    def columns(self) -> list[tuple[str, str, str]]:
        """Of a table of scores: a heading, and the score's name in `breakdown()` and in `compute()`."""

    @abstractmethod
    def _scores(self, table: Tensor) -> dict[str, Tensor]:
        """(N,) columns of what `rows` says of each pair."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a pair, ordered by index: `index`, `category`, and its scores."""
        with self.sync_context():
            table = self._distinct()
        scores = {name: column.tolist() for name, column in self._scores(table).items()}
        return [
            {"index": index, "category": self._category(category)}
            | {name: column[k] for name, column in scores.items()}
            for k, (index, category) in enumerate(table[:, :2].tolist())
        ]

    def breakdown(self) -> dict[str, dict[str, dict[str, float]]]:
        """Averages within groups of pairs: `{"category": {name: row}}`, where a row has `pairs`, how many there are."""
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
        """Gather the rows of all processes (torchmetrics calls this)."""
        if not len(self.table):  # torchmetrics would send a flat float tensor for a process that saw no pair
            self.table = [torch.empty(0, self.width, dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def _distinct(self) -> Tensor:
        """(N, width) on the CPU, one row an index: samplers pad a benchmark with repeats so that processes get alike
        many. Whole rows are sorted, so that the outcome does not depend on who saw what when."""
        parts = [self.table] if isinstance(self.table, Tensor) else self.table
        if not sum(map(len, parts)):
            raise ZooError(f"{type(self).__name__} has scored nothing yet: update() it with pairs that have keypoints")
        rows = torch.cat([part.cpu() for part in parts])
        rows = rows[rows[:, 0].argsort()]
        if (rows[:, 0].diff() == 0).any():
            rows = rows.unique(dim=0)  # slow
        return rows[rows[:, 0].diff(prepend=rows[:1, 0] - 1) != 0]
