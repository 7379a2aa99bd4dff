"""Augmentation of training pairs: flips, crops that keep the object, and changes of colour, as named recipes.

A sample's keypoints stay in pixels of the network image. Its size and box become those of the cropped image in original
pixels, so that PCK and its thresholds remain valid. All randomness comes from the given generator.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from corrzoo.data.pairs import Augment, mirror
from corrzoo.registry import Registry
from corrzoo.types import Pair, ZooError

AUGMENTS: Registry[Augment | None] = Registry("augmentation")


def create_augment(name: str) -> Augment | None:
    """The augmentation of a name, `(sample, generator) -> sample`; None for "none"."""
    return AUGMENTS[name]


def list_augments() -> list[str]:
    """Names of the augmentations for `create_augment`."""
    return AUGMENTS.names()


def flip(sample: Pair, rng: torch.Generator) -> Pair:
    """Mirror both images together with p = 0.5, as in SFNet's training pairs."""
    return mirror(sample) if chance(0.5, rng) else sample


def photometric(sample: Pair, rng: torch.Generator) -> Pair:
    """The colour changes of CATs, ACTR and LPMFlow, independently for each image."""
    return sample._replace(src_img=recolour(sample.src_img, rng), trg_img=recolour(sample.trg_img, rng))


Around = Literal["objects", "keypoints"]


def photometric_crop(sample: Pair, rng: torch.Generator, p: float, around: Around) -> Pair:
    """Colour changes, then crops with probability p."""
    return crop(photometric(sample, rng), rng, p, around)


def crop(sample: Pair, rng: torch.Generator, p: float = 0.7, around: Around = "objects") -> Pair:
    """Crop each image independently with probability p, at random outside its box, and resize it back.

    As in the released code of CATs, ACTR and LPMFlow, in pixels of the network image: the left edge is uniform on the
    integers [0, x1], the top on [0, y1], the right on [x2, W] and the bottom on [y2, H], with the box rounded down.
    Keypoints are clamped to [0, W - 1] and [0, H - 1]. our choice: without a box, the box of the keypoints is used.

    TransforMatcher crops around the keypoints with a margin of 20 original pixels, or around a single one with half of
    its distance to each border. The box is then cut with the image.

    Raises:
        ZooError: if a pair has nothing to crop around, as warps of one image.
    """
    for side in ("src", "trg"):
        if chance(p, rng):
            sample = _crop_side(sample, side, rng, around)
    return sample


def _crop_side(sample: Pair, side: str, rng: torch.Generator, around: str) -> Pair:
    image, kps, size, box = (getattr(sample, f"{side}_{what}") for what in ("img", "kps", "size", "box"))
    H, W = image.shape[-2:]
    full = torch.tensor([W, H])
    scale = full / size  # original -> network pixels
    real = kps[sample.kps_mask]
    if around == "objects" and not box.isnan().any():
        inside = box * scale.repeat(2)
    elif len(real):
        low, high = real.amin(0), real.amax(0)
        if around == "keypoints":
            margin = (low / 2, (full - high) / 2) if len(real) == 1 else (20 * scale, 20 * scale)
            low, high = low - margin[0], high + margin[1]
        inside = torch.cat([low, high])
    else:
        lack = "crops around boxes or keypoints, which these pairs lack"
        raise ZooError(f"the augmentation {lack}: choose another data.augment, such as photometric")
    x1, y1, x2, y2 = (int(v) for v in torch.minimum(inside.floor().clamp(min=0), torch.tensor([W - 1, H - 1, W, H])))
    left, top = _integer(0, x1, rng), _integer(0, y1, rng)
    # at least one pixel remains of a box thinner than a pixel
    right, bottom = _integer(max(x2, left + 1), W, rng), _integer(max(y2, top + 1), H, rng)
    corner, part = torch.tensor([left, top]), torch.tensor([right - left, bottom - top])
    moved = ((kps - corner) * (full / part)).clamp(min=torch.zeros(2), max=full - 1.0)
    moved_box = box - (corner / scale).repeat(2)
    if around == "keypoints":
        moved_box = moved_box.clamp(min=torch.zeros(4), max=(part / scale).repeat(2))
    mask = getattr(sample, f"{side}_mask")
    if mask.shape == (H, W):  # a mask of one cell stands for the whole image
        mask = TF.resized_crop(mask[None], top, left, bottom - top, right - left, [H, W])[0]
    return sample._replace(
        **{
            f"{side}_img": TF.resized_crop(image, top, left, bottom - top, right - left, [H, W], antialias=True),
            f"{side}_kps": torch.where(sample.kps_mask[:, None], moved, kps),
            f"{side}_size": part / scale,
            f"{side}_box": moved_box,
            f"{side}_mask": mask,
        }
    )


def recolour(image: Tensor, rng: torch.Generator) -> Tensor:
    """The colour changes of ACTR and LPMFlow (train transform of the released code): seven in this order, each p = 0.2.

    Their code calls albumentations. our choice: torchvision's operations with albumentations' default ranges; notes
    say where the two differ. Images are (3, H, W) uint8.
    """
    changes: list[Callable[[Tensor, torch.Generator], Tensor]] = [
        lambda image, rng: TF.rgb_to_grayscale(image, num_output_channels=3),
        lambda image, rng: TF.posterize(image, bits=4),
        lambda image, rng: TF.equalize(image),  # rounded as by PIL; albumentations rounds as OpenCV: a level apart
        _sharpen,
        _brightness_contrast,
        lambda image, rng: TF.solarize(image, threshold=128),
        _jitter,
    ]
    for change in changes:
        if chance(0.2, rng):
            image = change(image, rng)
    return image


def _sharpen(image: Tensor, rng: torch.Generator) -> Tensor:
    """Sharpen by a in [0.2, 0.5] times (8 centre - neighbours), and darken to 1 - a + a l, l in [0.5, 1].

    torchvision's factor f adds (f - 1) / 13 times the same difference, so f = 1 + 13 a. Unlike albumentations it keeps
    the border pixels, and clips values before darkening, not after.
    """
    a, lightness = uniform(0.2, 0.5, rng), uniform(0.5, 1.0, rng)
    return TF.adjust_brightness(TF.adjust_sharpness(image, 1 + 13 * a), 1 - a + a * lightness)


def _brightness_contrast(image: Tensor, rng: torch.Generator) -> Tensor:
    """Change x to x (1 + c) + 255 b, with c and b in [-0.2, 0.2]. torchvision has no such operation."""
    contrast, brightness = uniform(0.8, 1.2, rng), uniform(-0.2, 0.2, rng)
    return (image.float() * contrast + 255 * brightness).clamp(0, 255).to(torch.uint8)


def _jitter(image: Tensor, rng: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation in [0.8, 1.2] and hue in [-0.2, 0.2], in random order.

    These were albumentations' defaults when CATs was released. Its hue range is wider today.
    """
    changes: list[tuple[Callable[[Tensor, float], Tensor], float]] = [
        (TF.adjust_brightness, uniform(0.8, 1.2, rng)),
        (TF.adjust_contrast, uniform(0.8, 1.2, rng)),
        (TF.adjust_saturation, uniform(0.8, 1.2, rng)),
        (TF.adjust_hue, uniform(-0.2, 0.2, rng)),
    ]
    for k in torch.randperm(len(changes), generator=rng).tolist():
        change, amount = changes[k]
        image = change(image, amount)
    return image


def chance(p: float, rng: torch.Generator) -> bool:
    """True with probability p."""
    return uniform(0, 1, rng) < p


def uniform(low: float, high: float, rng: torch.Generator) -> float:
    """A random number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=rng))


def _integer(low: int, high: int, rng: torch.Generator) -> int:
    """A random integer in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=rng))


AUGMENTS.add("none", None)
AUGMENTS.add("flip", flip)
AUGMENTS.add("photometric", photometric)
AUGMENTS.add("cats", partial(photometric_crop, p=0.7, around="objects"))  # ACTR and LPMFlow, after CATs
AUGMENTS.add("cats_original", partial(photometric_crop, p=0.5, around="objects"))  # CATs itself
AUGMENTS.add("transformatcher", partial(photometric_crop, p=0.5, around="keypoints"))
