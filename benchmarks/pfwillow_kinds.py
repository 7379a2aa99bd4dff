"""PF-WILLOW in splits of one's own, by category: `lightning fit --plugins pfwillow_kinds ...`.

For learning from real images without a look at the category that is tested on. This is no protocol of the field:
PF-WILLOW has test pairs alone, so results of a model trained on them are not comparable with published numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corrzoo.data.pairs import DATASETS
from corrzoo.data.readers.pfwillow import CATEGORIES, PFWillow
from corrzoo.geometry import Size
from corrzoo.types import Record, ZooError

KINDS = list(dict.fromkeys(category.split("(")[0] for category in CATEGORIES))
"""car, duck, motorbike, winebottle: what the ten sub-classes show."""


def kind_of(category: str) -> str:
    """`car` of `car(G)`."""
    return category.split("(")[0]


@DATASETS.register
class PFWillowKinds(PFWillow):
    """The pairs of some kinds of objects in each split.

    Args:
        root: See `PFWillow`, as all the others.
        split: "trn" (or "train"), "val" or "test".
        size: Side of the square network image, or its (H, W).
        kinds: Which, by split: `{"trn": ["car", "duck"], "val": ["motorbike"], "test": ["winebottle"]}`.
        every: Of a split, score only every n-th pair: `{"val": 7}`.
    """

    name = "pfwillow_kinds"
    splits = ("trn", "val", "test")

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: int | Size = 224,
        *,
        kinds: dict[str, list[str]],
        every: dict[str, int] | None = None,
        **options: Any,
    ) -> None:
        self._kinds, self._every = kinds.get("trn" if split == "train" else split, []), (every or {}).get(split, 1)
        if not self._kinds or not set(self._kinds) <= set(KINDS):
            raise ZooError(f"{self.name}: the kinds of split {split!r} are {self._kinds}: choose from {KINDS}")
        super().__init__(root, split, size, **options)

    def sources(self) -> list[Path]:
        chosen = super().sources()
        return [path for path in chosen if path.is_file() or kind_of(path.name) in self._kinds]

    def read(self) -> Iterator[tuple[str, Record]]:
        return ((where, record) for where, record in super().read() if kind_of(record.category) in self._kinds)

    def order(self) -> list[int]:
        return super().order()[:: self._every]
