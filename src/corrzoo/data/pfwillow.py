"""PF-WILLOW (Ham et al., CVPR 2016): 10 sub-classes of 10 images, 900 test pairs, 10 keypoints, no boxes."""

from collections.abc import Iterator
from functools import cache
from itertools import permutations
from pathlib import Path, PurePosixPath

from torch import Tensor

from corrzoo.data.images import image_size
from corrzoo.data.index import read_points
from corrzoo.data.lists import read_list, read_mat
from corrzoo.data.pairs import DATASETS, FolderDataset
from corrzoo.types import Record, ZooError

CATEGORIES = [
    *("car(G)", "car(M)", "car(S)", "duck(S)", "motorbike(G)", "motorbike(M)", "motorbike(S)"),
    *("winebottle(M)", "winebottle(wC)", "winebottle(woC)"),
]


@DATASETS.register("pfwillow")
class PFWillow(FolderDataset):
    """PF-WILLOW: from its list of pairs, or without one from the .mat files, as all ordered pairs of each sub-class."""

    name = "pfwillow"
    folder = "PF-WILLOW"
    holds = "the folders car(G) to winebottle(woC) with .mat files or beside test_pairs.csv"
    splits = ("test",)
    threshold = "bbox-kp"
    categories = CATEGORIES

    def sources(self) -> list[Path]:
        first = self.need(self.home / CATEGORIES[0], self.home / "PF-dataset" / CATEGORIES[0])
        self._folders = {category: self.need(first.parent / category) for category in CATEGORIES}
        lists = [self.home / "test_pairs.csv", self.home / "test_pairs_pf.csv"]
        self._list = next((path for path in lists if path.is_file()), None)
        return [*([self._list] if self._list else []), *self._folders.values()]

    def read(self) -> Iterator[tuple[str, Record]]:
        rows = self._read_list(self._list) if self._list else self._read_mats()
        size = cache(image_size)
        for where, category, (src, src_kps), (trg, trg_kps) in rows:
            yield where, Record(src, trg, src_kps, trg_kps, size(src), size(trg), category)

    def _read_list(self, path: Path) -> Iterator[tuple[str, str, tuple[Path, Tensor], tuple[Path, Tensor]]]:
        for where, row in read_list(path, 42):
            categories = [PurePosixPath(cell).parent.name for cell in row[:2]]
            for category in categories:
                if category not in self._folders:
                    raise ZooError(f"{where}: unknown category {category!r}: expected one of {', '.join(CATEGORIES)}")
            src, trg = (self._folders[c] / PurePosixPath(cell).name for c, cell in zip(categories, row, strict=False))
            src_kps = read_points(zip(row[2:12], row[12:22], strict=True), where)
            trg_kps = read_points(zip(row[22:32], row[32:42], strict=True), where)
            yield where, categories[0], (src, src_kps), (trg, trg_kps)

    def _read_mats(self) -> Iterator[tuple[str, str, tuple[Path, Tensor], tuple[Path, Tensor]]]:
        for category, folder in self._folders.items():
            images = []
            for image in sorted(folder.glob("[!.]*.png")):
                path = image.with_suffix(".mat")
                images.append((image, read_points(read_mat(path, "pts_coord").T, str(path))))
            for src, trg in permutations(images, 2):
                yield f"{src[0]} and {trg[0].name}", category, src, trg
