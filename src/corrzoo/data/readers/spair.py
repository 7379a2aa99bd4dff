"""SPair-71k (Min et al., 2019, arXiv:1908.10543): 18 categories, 53,340 / 5,384 / 12,234 pairs."""

import os
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from corrzoo.data.pairs import DATASETS, FolderDataset, Groups
from corrzoo.data.readers import symmetry
from corrzoo.data.readers.tables import read_box, read_ids, read_json, read_points
from corrzoo.geometry import Size
from corrzoo.types import Record, ZooError

CATEGORIES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "train", "tvmonitor"),
]


@DATASETS.register
class SPair71k(FolderDataset):
    """SPair-71k, with boxes and difficulty flags. A copy without `ImageAnnotation` has no geometry-aware PCK.

    Args:
        layout: "large" for all pairs, "small" for the subset of 10,652 / 1,070 / 2,438.
    """

    name = "spair71k"
    folder = "SPair-71k"
    holds = "JPEGImages, PairAnnotation and Layout"
    splits: ClassVar[tuple[str, ...]] = ("trn", "val", "test")
    categories = CATEGORIES
    mirror_pairs: ClassVar[Groups] = symmetry.SPAIR71K
    groups: ClassVar[Groups] = symmetry.SPAIR71K_GROUPS

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: int | Size = 224,
        *,
        layout: Literal["large", "small"] = "large",
        **options: Any,
    ) -> None:
        self.layout = layout
        super().__init__(root, split, size, **options)

    def sources(self) -> list[Path]:
        images = self.need(self.home / "JPEGImages")
        self._annotations = self.need(self.home / "PairAnnotation" / self.split)
        self.pair_folder = self._annotations
        self._list = self.need(self.home / "Layout" / self.layout / f"{self.split}.txt")
        notes = self.home / "ImageAnnotation"
        folders = (folder / name for folder in (images, notes) for name in CATEGORIES)
        return [self._list, self._annotations, *filter(Path.is_dir, folders)]

    def read(self) -> Iterator[tuple[str, Record]]:
        parts = cache(self._read_parts) if (self.home / "ImageAnnotation").is_dir() else None
        files = set(os.listdir(self._annotations))
        for line in self._list.read_text("utf-8", "replace").splitlines():
            if pair := line.strip():
                path = self._annotations / self._file_of(pair, files)
                yield str(path), self.read_pair(path, parts)

    def _file_of(self, pair: str, files: set[str]) -> str:
        """Name of a pair's annotation file. Some file systems and archivers replace its colon."""
        for colon in (":", "_", "%3A"):
            if (name := pair.replace(":", colon) + ".json") in files:
                return name
        path = self._annotations / f"{pair}.json"
        raise ZooError(f"no annotation {path}, listed in {self._list}: fetch the dataset again")

    def read_pair(self, path: Path, parts: Callable[[str, str], Collection[int]] | None = None) -> Record:
        """The pair in one annotation file. `parts(category, name)` returns all visible parts of an image, if known."""
        where = str(path)
        with read_json(path, "an annotation of SPair-71k", "fetch it again") as pair:
            category, images = pair["category"], self.home / "JPEGImages" / pair["category"]
            kps_ids = read_ids(pair["kps_ids"], where) if "kps_ids" in pair else None
            src_size, trg_size = ((int(w), int(h)) for w, h, *_ in (pair["src_imsize"], pair["trg_imsize"]))
            src_alike, trg_alike = (
                None if parts is None or kps_ids is None else self.alike(category, kps_ids, parts(category, image))
                for image in (pair["src_imname"], pair["trg_imname"])
            )
            return Record(
                src_path=images / pair["src_imname"],
                trg_path=images / pair["trg_imname"],
                src_kps=read_points(pair["src_kps"], where),
                trg_kps=read_points(pair["trg_kps"], where),
                src_size=src_size,
                trg_size=trg_size,
                category=category,
                src_box=read_box(pair["src_bndbox"], where),
                trg_box=read_box(pair["trg_bndbox"], where),
                flags={
                    "viewpoint": int(pair["viewpoint_variation"]),
                    "scale": int(pair["scale_variation"]),
                    "truncation": int(pair["truncation"]),
                    "occlusion": int(pair["occlusion"]),
                },
                kps_ids=kps_ids,
                src_alike=src_alike,
                trg_alike=trg_alike,
            )

    def _read_parts(self, category: str, image: str) -> Collection[int]:
        path = self.home / "ImageAnnotation" / category / f"{Path(image).stem}.json"
        with read_json(path, "an image annotation of SPair-71k", "fetch it again") as note:
            return frozenset(int(part) for part, at in note["kps"].items() if at is not None)


@DATASETS.register
class SPairU(SPair71k):
    """SPair-U (Mariotti et al., "Jamais Vu", 2025): SPair-71k's test pairs with keypoints that are in no training pair.

    Annotations are as in SPair-71k and refer to its images. They are read from `SPair-U/PairAnnotation/test` beside
    `SPair-71k/`, or from `SPair-71k/ExtraPairAnnotation/test` as in the authors' code: all files, sorted by name. Pairs
    without a common keypoint have no PCK and are left out.
    """

    name = "spair71k_u"
    mirror_pairs: ClassVar[Groups] = {}  # its keypoints are others than SPair-71k's
    groups: ClassVar[Groups] = {}
    holds = "JPEGImages of SPair-71k, and SPair-U's annotations as ExtraPairAnnotation/test,"
    origin = "unpack https://groups.inf.ed.ac.uk/hbilen-data/data/JamaisVuData/SPair-U.zip beside it"
    splits = ("test",)

    def sources(self) -> list[Path]:
        images = self.need(self.home / "JPEGImages")
        beside = [self.home.parent / "SPair-U" / name / "test" for name in ("PairAnnotation", "ExtraPairAnnotation")]
        self._annotations = self.need(*beside, self.home / "ExtraPairAnnotation" / "test")
        return [self._annotations, *filter(Path.is_dir, (images / name for name in CATEGORIES))]

    def read(self) -> Iterator[tuple[str, Record]]:
        pairs = ((str(path), self.read_pair(path)) for path in sorted(self._annotations.glob("*.json")))
        return ((where, record) for where, record in pairs if len(record.src_kps) or len(record.trg_kps))
