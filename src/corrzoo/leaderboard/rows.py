"""Rankings, their rows, and the scores in them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import NamedTuple

SUPERVISION = ("keypoints", "weak", "none")
"""Supervision of a method, in the order of a ranking's groups. `weak` means images, masks or boxes, but no keypoints;
`none` means training-free."""


class Spread(NamedTuple):
    """A score over seeds: mean, and sample standard deviation if there are two or more."""

    mean: float
    deviation: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.deviation:.1f}" if self.deviation is not None else "")


@dataclass
class Row:
    """A measured configuration, or a method as a paper lists it. Scores are in percent, by measure ("PCK @0.1")."""

    head: str  # head of the zoo, or published method
    backbone: str
    variant: str
    supervision: str  # one of SUPERVISION; empty if a paper does not state it
    trained: str  # training dataset; empty if unknown or training-free
    resolution: str
    pairs_seen: int | None = None  # training pairs, repetitions included
    runs: int = 0  # seeds; 0 for published rows
    device: str = ""
    place: int = 0  # among the rows of the ranking with this supervision; among all if published
    costs: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Spread] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    source: str = ""  # paper and table of the published scores; or origin of predictions that `corrzoo score` scored
    groups: dict[tuple[str, str], dict[str, Spread]] = field(default_factory=dict)
    """Scores of groups of pairs: ("category", "bus"), ("scale", "hard"), ..."""

    def difference(self, measure: str) -> float | None:
        """Measured - published, if both exist."""
        both = measure in self.measured and measure in self.published
        return self.measured[measure].mean - self.published[measure] if both else None


class Ranking(NamedTuple):
    """Comparable rows: same dataset, protocol, pairs and measures."""

    study: str  # folder of the result files; "published" for the papers' tables
    dataset: str  # its title, which tells a partial copy from the whole dataset
    split: str
    protocol: str
    measures: list[str]
    pairs: int | None
    options: dict[str, object]  # of the dataset
    flaw: str  # of the protocol
    rows: list[Row]  # best first; measured rows are grouped by supervision

    @property
    def headline(self) -> str:
        """The measure that ranks: PCK @0.1, or else the last one, which has the largest tolerance."""
        return "PCK @0.1" if "PCK @0.1" in self.measures else self.measures[-1]
