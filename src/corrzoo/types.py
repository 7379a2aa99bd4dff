"""The data types of the zoo: Record (an annotation) -> Pair -> Features -> Match; and its one error.

Batches are NamedTuples, because Lightning refuses frozen dataclasses as batches.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from corrzoo.errors import ZooError as ZooError
from corrzoo.errors import one_line

DIFFICULTIES = ("viewpoint", "scale", "truncation", "occlusion")
"""SPair-71k's difficulty flags, in the order of `Pair.difficulty`'s columns; -1 stands for 'not annotated'."""


@dataclass(frozen=True)
class Record:
    """One annotated pair, in original pixels.

    Keypoint k of the source and keypoint k of the target are the same semantic point; points that are not visible
    in both images are left out.
    """

    src_path: Path | None
    """None for images that are rendered on the fly."""
    trg_path: Path | None
    src_kps: Tensor
    """(n, 2) float64, (x, y)."""
    trg_kps: Tensor
    """(n, 2) float64, (x, y)."""
    src_size: tuple[int, int]
    """(w, h)."""
    trg_size: tuple[int, int]
    """(w, h)."""
    category: str
    src_box: Tensor | None = None
    """(4,) float64 xyxy; None when the dataset has no boxes."""
    trg_box: Tensor | None = None
    """(4,) float64 xyxy; None when the dataset has no boxes."""
    flags: dict[str, int] = field(default_factory=dict)
    """Difficulty flags by their names in `DIFFICULTIES`; empty when the dataset has none."""
    flip: bool = False
    """Both images are to be mirrored (PF-PASCAL's training list). The coordinates here are those before it."""
    src_polygon: Tensor | None = None
    """(m, 2) float64 outline of the object (Caltech-101, which has no keypoints): its vertices have no partners."""
    trg_polygon: Tensor | None = None
    """(m', 2) float64."""
    kps_ids: Tensor | None = None
    """(n,) int64: the part that each keypoint marks, as the dataset numbers its parts; None if unknown."""
    src_alike: Tensor | None = None
    """(n,) bool: whether another part that looks like the keypoint's is visible in the source; None if unknown."""
    trg_alike: Tensor | None = None
    """(n,) bool, likewise in the target. Where True, the keypoint is geometry-aware (GeoAware-SC, CVPR 2024)."""


EVERYWHERE = torch.ones(1, 1)
"""The mask of an object that may be anywhere in its image."""
UNKNOWN = torch.tensor([-1])
"""Keypoint ids when none is known; broadcasts to any number of keypoints."""
NONE_ALIKE = torch.tensor([False])
"""`Pair.src_alike` when nothing is known; broadcasts to any number of keypoints."""


class Pair(NamedTuple):
    """A batch of image pairs. Coordinates are (x, y) in pixels of the network image, see `geometry`.

    One sample, as `dataset[i]` gives it, has the same fields without the leading B.
    """

    src_img: Tensor
    """(B, 3, H, W) uint8 as read, or float once normalised for the backbone (`Backbone.normalise`)."""
    trg_img: Tensor
    """(B, 3, H, W), like src_img."""
    src_kps: Tensor
    """(B, K, 2) float32; zero in rows where kps_mask is False."""
    trg_kps: Tensor
    """(B, K, 2) float32."""
    kps_mask: Tensor
    """(B, K) bool: which of the K rows are keypoints."""
    src_size: Tensor
    """(B, 2) float32, original (w, h)."""
    trg_size: Tensor
    """(B, 2) float32, original (w, h)."""
    src_box: Tensor
    """(B, 4) float32 xyxy in original pixels; NaN when the dataset has no boxes."""
    trg_box: Tensor
    """(B, 4) float32 xyxy in original pixels; NaN when the dataset has no boxes."""
    index: Tensor  # type: ignore[assignment]  # the field hides tuple.index, which nobody calls on a batch
    """(B,) int64 position in the benchmark: what makes evaluation by many processes exact."""
    src_id: Tensor
    """(B,) int64 image number in the dataset: what lets an image's features be computed once; -1 when augmented.
    A mirrored image has another number than the image. Image numbers stay on the CPU."""
    trg_id: Tensor
    """(B,) int64."""
    category: Tensor
    """(B,) int64 position in the dataset's `categories`."""
    difficulty: Tensor
    """(B, 4) int64 flags in the order of `DIFFICULTIES`; -1 where not annotated."""
    src_mask: Tensor = EVERYWHERE
    """(B, h, w) float in [0, 1], laid over the image: where the object is; one cell of 1 where there is no mask."""
    trg_mask: Tensor = EVERYWHERE
    """(B, h, w), like src_mask."""
    kps_ids: Tensor = UNKNOWN
    """(B, K) int64: the part that each keypoint marks in both images; -1 if unknown, and where kps_mask is False."""
    mirror_ids: Tensor = UNKNOWN
    """(B, K) int64: kps_ids once both images are mirrored, as a left eye is then a right eye; -1 if unknown."""
    src_alike: Tensor = NONE_ALIKE
    """(B, K) bool: whether another part that looks like the keypoint's is visible in the source; False if unknown."""
    trg_alike: Tensor = NONE_ALIKE
    """(B, K) bool, like src_alike."""

    def swapped(self) -> "Pair":
        """The same pairs with source and target exchanged, to predict source points from target points."""
        other = {"src": "trg", "trg": "src"}
        return self._replace(**{f: getattr(self, other[f[:3]] + f[3:]) for f in self._fields if f[:3] in other})

    def image_numbers(self) -> list[int]:
        """Numbers of all images, sources first; empty if one is unknown, as after augmentation."""
        numbers = [*self.src_id.tolist(), *self.trg_id.tolist()]
        return numbers if min(numbers) >= 0 else []


class Features(NamedTuple):
    """What a backbone sees in one image of each pair."""

    image: Tensor
    """(B, 3, H, W) normalised network image, at the size it was given in."""
    maps: list[Tensor]
    """One (B, C, h, w) map for each requested level."""
    cls: Tensor | None = None
    """(B, C) class token of the last level; None when the backbone has none."""

    def with_maps(self, maps: list[Tensor]) -> "Features":
        """The same images with other maps. In a compiled method, `_replace` gives an empty tuple with torch 2.11."""
        return Features(self.image, maps, self.cls)

    def halves(self) -> "tuple[Features, Features]":
        """Source and target features that were computed as one batch."""
        src, trg = self.image.chunk(2)
        levels = [level.chunk(2) for level in self.maps]
        src_cls, trg_cls = (None, None) if self.cls is None else self.cls.chunk(2)
        return Features(src, [a for a, _ in levels], src_cls), Features(trg, [b for _, b in levels], trg_cls)


class Match(NamedTuple):
    """The output of a matching head."""

    flow: Tensor
    """(B, 2, h, w): displacement (dx, dy) from each source cell's centre to its target, in network image pixels."""
    correlation: Tensor | None = None
    """(B, h*w, h'*w') scores of every source cell against every target cell, when the head keeps them."""
    extras: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple default; nobody writes into it
    """Whatever else the head's own loss needs."""


class PointMatcher(Protocol):
    """What evaluation and inference need of a model; `matcher.Matcher` is one."""

    backbone: Any
    image_size: Any

    @property
    def device(self) -> Any: ...

    def eval(self) -> Any: ...

    def load_weights(self) -> Any: ...

    def features(self, pair: Pair) -> tuple[Features, Features]: ...

    def prepare(self, features: Features) -> Features: ...

    def match(self, src: Features, trg: Features) -> Match: ...

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor: ...

    def match_keypoints(self, src: Features, trg: Features, pair: Pair) -> Tensor: ...

    def heat_maps(self, src: Features, trg: Features, points: Tensor) -> Tensor: ...


def as_points(points: object) -> Tensor:
    """(n, 2) float64 points on the CPU from a tensor, an array or nested lists; [] has none.

    Raises:
        ZooError: if they are no numbers, or the shape is another.
    """
    try:
        out = torch.as_tensor(points, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ZooError(f"expected points of shape (n, 2): {one_line(error)}") from error
    if out.shape == (0,):
        return out.reshape(0, 2)
    if out.ndim != 2 or out.shape[1] != 2:
        raise ZooError(f"expected points of shape (n, 2), got {tuple(out.shape)}")
    return out
