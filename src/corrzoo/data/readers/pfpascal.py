"""PF-PASCAL (Ham et al., 2017): 20 categories, 2,940 / 308 / 299 pairs of images of at most 300 pixels.

A third of the test pairs are also in the training list. Published numbers include them, and so does this reader.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from corrzoo.data.pairs import DATASETS, FolderDataset
from corrzoo.data.readers.tables import category_of, read_box, read_list, read_mat, read_points
from corrzoo.images import image_size
from corrzoo.types import Record, ZooError

CATEGORIES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


@DATASETS.register
class PFPascal(FolderDataset):
    """PF-PASCAL, in the layout of HPF or as the authors' archive with the lists of NCNet beside it.

    Without .mat annotations the keypoints come from the test list, and there are no boxes.
    """

    name = "pfpascal"
    folder = "PF-PASCAL"
    holds = "JPEGImages and Annotations (or the authors' PF-dataset-PASCAL with both) and {trn,val,test}_pairs.csv"
    splits = ("trn", "val", "test")
    threshold = "img"
    categories = CATEGORIES

    def sources(self) -> list[Path]:
        self._images = self.need(self.home / "JPEGImages", self.home / "PF-dataset-PASCAL" / "JPEGImages")
        self._annotations = self._images.parent / "Annotations"
        names = ["trn", "train"] if self.split == "trn" else [self.split]
        patterns = ("{}_pairs.csv", "{}_pairs_pf_pascal.csv", "image_pairs/{}_pairs.csv")
        self._list = self.need(*(self.home / pattern.format(name) for pattern in patterns for name in names))
        annotations = filter(Path.is_dir, (self._annotations / name for name in CATEGORIES))
        return [self._list, self._images, *annotations]

    def read(self) -> Iterator[tuple[str, Record]]:
        size, mat = cache(image_size), cache(read_mat)
        for where, row in read_list(self._list, 3):
            src, trg = (self._images / PurePosixPath(cell).name for cell in row[:2])
            category = category_of(row[2], CATEGORIES, where)
            if len(row) >= 7 and not self._annotations.is_dir():
                x_src, y_src, x_trg, y_trg = (cell.split(";") for cell in row[3:7])
                src_kps = read_points(zip(x_src, y_src, strict=True), where)
                trg_kps = read_points(zip(x_trg, y_trg, strict=True), where)
                src_box = trg_box = None
            else:
                src_mat, trg_mat = (self._annotations / category / f"{image.stem}.mat" for image in (src, trg))
                src_kps, trg_kps = read_points(mat(src_mat, "kps"), where), read_points(mat(trg_mat, "kps"), where)
                if len(src_kps) != len(trg_kps):
                    found = f"{len(src_kps)} source but {len(trg_kps)} target keypoints in the .mat files"
                    raise ZooError(f"{where}: {found}")
                both = (src_kps + trg_kps).isfinite().all(1)
                src_kps, trg_kps = src_kps[both], trg_kps[both]
                src_box, trg_box = (read_box(mat(path, "bbox").ravel(), str(path)) for path in (src_mat, trg_mat))
            # Column 3 is the flip in the training list, but XA in the test list.
            flip = self.split == "trn" and row[3:4] == ["1"]
            sizes = size(src), size(trg)
            yield where, Record(src, trg, src_kps, trg_kps, *sizes, category, src_box, trg_box, flip=flip)
