"""Caltech-101 (Fei-Fei et al., 2004) with the 1,515 pairs of Rocco et al. (WeakAlign, CVPR 2018)."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import torch

from corrzoo.data.pairs import DATASETS, FolderDataset
from corrzoo.data.readers.tables import category_of, read_list, read_points
from corrzoo.images import image_size
from corrzoo.types import Record

CATEGORIES = """
    Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai brain
    brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body cougar_face
    crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar elephant emu
    euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill headphone hedgehog
    helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus mandolin mayfly menorah
    metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid revolver rhino rooster saxophone
    schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign strawberry sunflower
    tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench yin_yang
""".split()


@DATASETS.register
class Caltech101(FolderDataset):
    """Caltech-101, with outlines (`Record.src_polygon` and `trg_polygon`) instead of keypoints. Samples have K = 0.

    `lightning test` scores it by label transfer in original pixels, see `scoring.label_transfer`.
    """

    name = "caltech101"
    folder = "Caltech-101"
    holds = "101_ObjectCategories and test_pairs_caltech_with_category.csv"
    splits = ("test",)
    outlines = True
    categories = CATEGORIES

    def sources(self) -> list[Path]:
        self._images = self.need(self.home / "101_ObjectCategories")
        self._list = self.need(self.home / "test_pairs_caltech_with_category.csv", self.home / "test_pairs_caltech.csv")
        return [self._list, *(self._images / category for category in CATEGORIES if (self._images / category).is_dir())]

    def read(self) -> Iterator[tuple[str, Record]]:
        size, no_kps = cache(image_size), torch.zeros(0, 2, dtype=torch.float64)
        for where, row in read_list(self._list, 7):
            src, trg = (self._images.joinpath(*PurePosixPath(cell).parts[-2:]) for cell in row[:2])
            x_src, y_src, x_trg, y_trg = (cell.split(",") for cell in row[3:7])
            record = Record(
                src_path=src,
                trg_path=trg,
                src_kps=no_kps,
                trg_kps=no_kps,
                src_size=size(src),
                trg_size=size(trg),
                category=category_of(row[2], CATEGORIES, where),
                src_polygon=read_points(zip(x_src, y_src, strict=True), where),
                trg_polygon=read_points(zip(x_trg, y_trg, strict=True), where),
            )
            yield where, record
