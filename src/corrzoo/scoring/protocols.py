"""Evaluation protocols of the field, by name.

A keypoint is correct if its error is within alpha * L. Published numbers differ in the length L, the frame of errors,
the evaluated image and the average over pairs. A preset with a threshold kind, such as `actr:bbox`, fixes all four. It
follows a project's released code, also where the paper differs. A preset with a wrong threshold has a `flaw`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from corrzoo.registry import Registry
from corrzoo.types import ZooError

# L is the larger side of
IMG: Final = "img"  # the image
BBOX: Final = "bbox"  # the annotated box
KP: Final = "bbox-kp"  # the tight box around the keypoints
PADDED: Final = "bbox-kp-padded"  # the tight box around the keypoints and the padding of the keypoint array
KINDS = (IMG, BBOX, KP, PADDED)

AVERAGES = ("image", "point", "category", "category-point")
"""Averages over a benchmark, defined in `pck.PCK`."""


class Side(NamedTuple):
    """Annotations of one image of each pair: float64, in original pixels."""

    kps: Tensor
    """(B, K, 2)."""
    size: Tensor
    """(B, 2) original (w, h)."""
    box: Tensor
    """(B, 4) xyxy; NaN if not annotated."""


@dataclass(frozen=True)
class Frame:
    """Frame in which errors and thresholds are measured.

    Args:
        fit: Map from an image of size (w, h) into the frame.
            original: identity.
            shrink: one factor for both axes; the larger side becomes at most `side`.
            pad: one factor for both axes; the larger side becomes `side`. Distances do not depend on the padding.
            stretch: to a square, x * side / w and y * side / h.
            align-corners: to a square, x * (side - 1) / (w - 1), y likewise.
        side: Side in pixels. It cancels from PCK if fit is stretch or pad; 1 then means that it is not known.
    """

    fit: Literal["original", "shrink", "pad", "stretch", "align-corners"] = "original"
    side: int = 0

    def __str__(self) -> str:
        return f"{self.fit} {self.side}" if self.side else self.fit

    def scale(self, size: Tensor) -> Tensor:
        """(B, 2) original (w, h) -> (B, 2) factors for x and y."""
        longest = size.amax(-1, keepdim=True).expand_as(size)
        match self.fit:
            case "original":
                return torch.ones_like(size)
            case "shrink":
                return (self.side / longest).clamp(max=1)
            case "pad":
                return self.side / longest
            case "stretch":
                return self.side / size
            case "align-corners":
                return (self.side - 1) / (size - 1)

    def image_side(self, size: Tensor) -> Tensor:
        """(B, 2) original (w, h) -> (B,) larger side of the image in the frame."""
        if self.fit in ("original", "shrink"):
            return (size * self.scale(size)).amax(-1)
        return torch.full_like(size[:, 0], self.side)

    def points(self, kps: Tensor, size: Tensor, annotated: bool) -> Tensor:
        """Points (B, K, 2) from original pixels to the frame.

        VisualAI, the only user of align-corners, first rounds annotated points down and finally clamps them.
        """
        if self.fit == "original":
            return kps
        scale = self.scale(size).unsqueeze(1)
        if annotated and self.fit == "align-corners":
            return (kps.floor() * scale).clamp(1e-4, self.side - 1 - 1e-4)
        return kps * scale


@dataclass(frozen=True)
class Protocol:
    """How predictions are scored. `get_protocol()` returns a preset.

    Args:
        name: Name of the preset.
        kinds: Threshold kinds that the preset offers, each with its frame.
        source: Source of the definition.
        kind: Threshold kind in use.
        evaluated: Image whose points are predicted and scored; the other image is the query.
        threshold_side: Image whose size or box gives the threshold.
        kps_side: Image whose keypoints give the threshold; `threshold_side` if None.
        boxless: Threshold kind that replaces `bbox` for pairs without boxes (PF-WILLOW); if empty, they are an error.
        padding: Coordinate that pads the keypoint array, in the frame.
        padded_max: Whether the maximum of `bbox-kp` includes the padding (wrong only if all coordinates are below it).
        compare: `<=` if an error of exactly alpha * L is correct, else `<`.
        averages: Averages that the authors report, the headline first.
    """

    name: str
    kinds: Mapping[str, Frame]
    source: str = "released code"
    kind: str = ""
    evaluated: Literal["src", "trg"] = "trg"
    threshold_side: Literal["evaluated", "query"] = "evaluated"
    kps_side: Literal["evaluated", "query"] | None = None
    boxless: Literal["", "bbox-kp", "bbox-kp-padded"] = ""
    padding: float = -1.0
    padded_max: bool = False
    compare: Literal["<=", "<"] = "<="
    averages: tuple[str, ...] = ("image",)

    def __str__(self) -> str:
        return f"{self.name}:{self.kind}"

    @property
    def frame(self) -> Frame:
        """Frame of the threshold kind in use."""
        return self.kinds[self.kind]

    @property
    def query(self) -> str:
        """Image whose points are given, `src` or `trg`."""
        return "src" if self.evaluated == "trg" else "trg"

    @property
    def meaning(self) -> str:
        """Description of L and the frame.

        >>> get_protocol("actr:bbox").meaning
        'larger side of the src box, or of the padded src keypoint box if there is no box; frame: stretch 512'
        """
        words = {IMG: "{} image", BBOX: "{} box", KP: "{} keypoint box", PADDED: "padded {} keypoint box"}
        kinds = [self.kind, self.boxless] if self.kind == BBOX and self.boxless else [self.kind]
        lengths = [words[kind].format(getattr(self, self._side(kind), self.query)) for kind in kinds]
        replaced = " if there is no box" if len(lengths) > 1 else ""
        return f"larger side of the {', or of the '.join(lengths)}{replaced}; frame: {self.frame}"

    @property
    def flaw(self) -> str:
        """Error in the published threshold; empty if there is none.

        >>> get_protocol("dhpf:bbox").flaw
        "padding counts as a keypoint where no box is annotated: PF-WILLOW's thresholds are 1.28 times too long"
        """
        flaws = []
        # In a square frame both images have the same side.
        if self._side(self.kind) == "query" and (self.kind != IMG or self.frame.fit in ("original", "shrink")):
            flaws.append(f"the threshold is the {self.query} image's, though {self.evaluated} is evaluated")
        if PADDED in (self.kind, self.boxless if self.kind == BBOX else ""):
            where = " where no box is annotated" if self.kind == BBOX else ""
            flaws.append(f"padding counts as a keypoint{where}: PF-WILLOW's thresholds are 1.28 times too long")
        return "; ".join(flaws)

    def _side(self, kind: str) -> str:
        return self.kps_side or self.threshold_side if kind in (KP, PADDED) else self.threshold_side

    def thresholds(self, evaluated: Side, query: Side, mask: Tensor) -> Tensor:
        """Length L of each pair, (B,) float64 in the protocol's frame. `mask` (B, K) marks the rows that are keypoints.

        The box of a single keypoint has length 0, so only exact predictions are correct.

        Raises:
            ZooError: if the protocol needs boxes and a pair has none.
        """
        sides = {"evaluated": evaluated, "query": query}
        side = sides[self._side(self.kind)]
        if self.kind == IMG:
            return self.frame.image_side(side.size)
        if self.kind != BBOX:
            return self._keypoint_box(self.kind, side, mask)
        length = ((side.box[:, 2:] - side.box[:, :2]) * self.frame.scale(side.size)).amax(-1)
        missing = length.isnan()
        if not missing.any():
            return length
        if not self.boxless:
            remedy = self.name if KP in self.kinds else "default"
            raise ZooError(f"protocol '{self}' needs annotated boxes and a pair has none: use '{remedy}:{KP}'")
        return torch.where(missing, self._keypoint_box(self.boxless, sides[self._side(self.boxless)], mask), length)

    def _keypoint_box(self, kind: str, side: Side, mask: Tensor) -> Tensor:
        kps, out = self.frame.points(side.kps, side.size, annotated=True), ~mask.unsqueeze(-1)
        low, high = kps.masked_fill(out, torch.inf).amin(1), kps.masked_fill(out, -torch.inf).amax(1)
        if kind == PADDED:
            low = low.clamp(max=self.padding)
        if kind == PADDED or self.padded_max:
            high = high.clamp(min=self.padding)
        return (high - low).amax(-1)


def get_protocol(name: str | Protocol, kind: str = "") -> Protocol:
    """Return the protocol `<preset>:<kind>`, or `<preset>` with the threshold kind `kind`; a Protocol is kept.

    >>> get_protocol("cats:img").evaluated
    'src'
    """
    if isinstance(name, Protocol):
        return name
    preset_name, colon, own = name.partition(":")
    kind = own if colon else kind
    preset = _PRESETS[preset_name]
    if kind not in preset.kinds:
        offered = ", ".join(f"'{preset_name}:{k}'" for k in preset.kinds)
        raise ZooError(f"protocol {preset_name!r} has no threshold kind {kind!r}: choose one of {offered}")
    return replace(preset, kind=kind)


def check_protocol(name: str) -> None:
    """Raise ZooError unless `name` is `<preset>` or `<preset>:<kind>`."""
    if ":" in name:
        get_protocol(name)
    else:
        _PRESETS[name]  # raises if there is none


def list_protocols() -> list[str]:
    """Names of all protocols, `<preset>:<kind>`."""
    return [f"{name}:{kind}" for name in _PRESETS.names() for kind in _PRESETS[name].kinds]


def _in(frame: Frame, *kinds: str) -> dict[str, Frame]:
    return dict.fromkeys(kinds, frame)


_ORIGINAL, _SQUARE_224, _SQUARE_240 = Frame(), Frame("stretch", 224), Frame("stretch", 240)
_SQUARE_512, _UNIT_SQUARE = Frame("stretch", 512), Frame("stretch", 1)
_UNRELEASED = "paper; no code, so the evaluated side and the frame are our choice"
_CATSPP = Protocol("catspp", _in(_SQUARE_512, *KINDS), evaluated="src", boxless=PADDED, padded_max=True)
# ACTR and LPMFlow predict target points, but kept src_bbox of CATs, which predicts source points.
_PADDED_SIDE = "released code; it has no bbox-kp (our choice: CATs++'s, on the side of its padded box)"
_ACTR = replace(_CATSPP, name="actr", source=_PADDED_SIDE, evaluated="trg", threshold_side="query")
_AS_RUN = "released code as it runs by default; its stretched variant has no preset"
_GEOAWARE = Protocol("geoaware", _in(Frame("pad", 840), IMG, BBOX), _AS_RUN, compare="<", averages=("point", "image"))
_TRAINING = "released eval code; the PCK of its training loop (float16 points, per point, <=) has no preset"

_PRESETS: Registry[Protocol] = Registry("protocol")
for _preset in (
    Protocol("default", _in(_ORIGINAL, *KINDS), "our choice: the number does not depend on the network's input size"),
    Protocol("hpf", _in(Frame("shrink", 300), IMG, BBOX, KP), boxless=KP),
    Protocol("dhpf", _in(_SQUARE_240, IMG, BBOX, PADDED), boxless=PADDED),
    Protocol("cats", _in(Frame("stretch", 256), IMG, BBOX, PADDED), evaluated="src", boxless=PADDED),
    _CATSPP,
    _ACTR,
    replace(_ACTR, name="lpmflow", kps_side="evaluated"),
    Protocol("tm", _in(_SQUARE_240, IMG, BBOX, PADDED), boxless=PADDED, padding=-2.0),
    Protocol("dift", _in(_ORIGINAL, BBOX), averages=("image", "point")),
    _GEOAWARE,
    replace(_GEOAWARE, name="distilldift", source=_TRAINING),
    Protocol("probe3d", _in(Frame("pad", 1), IMG, BBOX), compare="<", averages=("category-point",)),
    Protocol("lucaosti", _in(_UNIT_SQUARE, BBOX), averages=("image", "point")),
    # Our choice: boxes are scaled by the same align-corners factors as points.
    Protocol("visualai", _in(Frame("align-corners", 840), IMG, BBOX, KP), boxless=KP),
    Protocol("ncnet", _in(_SQUARE_224, IMG), evaluated="src"),
    Protocol("weakalign", _in(_SQUARE_224, IMG) | _in(_ORIGINAL, KP), evaluated="src"),
    Protocol("sfnet", _in(_UNIT_SQUARE, IMG) | _in(_ORIGINAL, KP), evaluated="src", averages=("image", "category")),
    Protocol("proposalflow", _in(_ORIGINAL, KP), averages=("category", "image")),
    Protocol("vitsc", _in(_ORIGINAL, *KINDS), f"{_UNRELEASED}; eq. 12", boxless=PADDED),
    Protocol("gsf", _in(_SQUARE_224, IMG) | _in(_ORIGINAL, BBOX, KP), f"{_UNRELEASED}; section 5.2", boxless=KP),
):
    _PRESETS.add(_preset.name, _preset)
