"""PF-WILLOW (Ham et al., CVPR 2016): 10 sub-classes of 10 images, 900 test pairs, 10 keypoints, no boxes."""

from collections.abc import Iterator
from functools import cache
from itertools import permutations
from pathlib import Path, PurePosixPath

from torch import Tensor

from corrzoo.data.pairs import DATASETS, FolderDataset
from corrzoo.data.readers.tables import read_list, read_mat, read_points
from corrzoo.images import image_size
from corrzoo.types import Record

CATEGORIES = [
    *("car(G)", "car(M)", "car(S)", "duck(S)", "motorbike(G)", "motorbike(M)", "motorbike(S)"),
    *("winebottle(M)", "winebottle(wC)", "winebottle(woC)"),
]


@DATASETS.register
class PFWillow(FolderDataset):
    """PF-WILLOW, from its list of pairs, or without a list from the .mat files: all ordered pairs of each sub-class."""

    name = "pfwillow"
    folder = "PF-WILLOW"
    holds = "the folders car(G) to winebottle(woC) with .mat files or beside test_pairs.csv"
    splits = ("test",)
    threshold = "bbox-kp"
    categories = CATEGORIES

    def sources(self) -> list[Path]:
        self._images = self.need(self.home / CATEGORIES[0], self.home / "PF-dataset" / CATEGORIES[0]).parent
        lists = [self.home / "test_pairs.csv", self.home / "test_pairs_pf.csv"]
        self._list = next(filter(Path.is_file, lists), None)
        return [*filter(None, [self._list]), *(self.need(self._images / category) for category in CATEGORIES)]

    def read(self) -> Iterator[tuple[str, Record]]:
        size = cache(image_size)
        for where, src, trg, src_kps, trg_kps in self._read_list(self._list) if self._list else self._read_mats():
            yield where, Record(src, trg, src_kps, trg_kps, size(src), size(trg), category=src.parent.name)

    def _read_list(self, path: Path) -> Iterator[tuple[str, Path, Path, Tensor, Tensor]]:
        for where, row in read_list(path, 42):
            src, trg = (self._images.joinpath(*PurePosixPath(cell).parts[-2:]) for cell in row[:2])
            src_kps = read_points(zip(row[2:12], row[12:22], strict=True), where)
            trg_kps = read_points(zip(row[22:32], row[32:42], strict=True), where)
            yield where, src, trg, src_kps, trg_kps

    def _read_mats(self) -> Iterator[tuple[str, Path, Path, Tensor, Tensor]]:
        """All ordered pairs of different images of a sub-class, sorted by name: 90 in each of 10."""
        for category in CATEGORIES:
            kps = {}
            for image in sorted((self._images / category).glob("[!.]*.png")):
                path = image.with_suffix(".mat")
                kps[image] = read_points(read_mat(path, "pts_coord").T, str(path))
            for src, trg in permutations(kps, 2):
                yield f"{src} and {trg.name}", src, trg, kps[src], kps[trg]
