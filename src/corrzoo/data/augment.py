"""What training does to pairs: flips, crops that keep the object, and colours. Recipes have names.

An augmented sample is a sample of other images. Its keypoints stay in pixels of the network image, and its size and box
become those of the cropped image in original pixels: scaling one to the other, PCK and its thresholds hold as before.
`PairDataset` takes away the image numbers, for features of an augmented image are not those of the image on disk.

All randomness comes from the generator that is given.
"""

from collections.abc import Callable

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from corrzoo.data.pairs import Augment, mirror
from corrzoo.registry import Registry
from corrzoo.types import Pair

AUGMENTS: Registry[Augment | None] = Registry("augmentation", "list_augments()")


def create_augment(name: str) -> Augment | None:
    """The augmentation of that name, `(sample, generator) -> sample`; None for "none".

    Raises:
        ZooError: for an unknown name.
    """
    return AUGMENTS[name]


def list_augments() -> list[str]:
    """Names that `create_augment` knows."""
    return AUGMENTS.names()


def flip(sample: Pair, rng: torch.Generator) -> Pair:
    """Both images mirrored together, half of the time (p = 0.5 as in SFNet's training pairs)."""
    return mirror(sample) if _chance(0.5, rng) else sample


def photometric(sample: Pair, rng: torch.Generator) -> Pair:
    """The colour chain of CATs, ACTR and LPMFlow, drawn for each image on its own."""
    return sample._replace(src_img=recolour(sample.src_img, rng), trg_img=recolour(sample.trg_img, rng))


def cats(sample: Pair, rng: torch.Generator) -> Pair:
    """Training pairs of CATs, ACTR and LPMFlow: the colour chain, then crops around the objects with p = 0.7."""
    return crop(photometric(sample, rng), rng, p=0.7)


def crop(sample: Pair, rng: torch.Generator, p: float = 0.7) -> Pair:
    """Each image, on its own with probability p, cropped at random outside its box and resized back.

    As released by CATs, ACTR and LPMFlow, in pixels of the network image: the left edge is uniform on the integers
    [0, x1], the top on [0, y1], the right on [x2, W] and the bottom on [y2, H], with the box rounded down; keypoints
    are clamped to [0, W - 1] and [0, H - 1]. our choice: without a box, that of the keypoints serves.

    Args:
        sample: Images (3, H, W), keypoints (n, 2).
        rng: Where the randomness comes from.
        p: Probability for each image.
    """
    for side in ("src", "trg"):
        if _chance(p, rng):
            sample = _crop_side(sample, side, rng)
    return sample


def _crop_side(sample: Pair, side: str, rng: torch.Generator) -> Pair:
    image, kps, size, box = (getattr(sample, f"{side}_{what}") for what in ("img", "kps", "size", "box"))
    H, W = image.shape[-2:]
    full = torch.tensor([W, H])
    scale = full / size  # original -> network pixels
    real = kps[sample.kps_mask]
    inside = torch.cat([real.amin(0), real.amax(0)]) if box.isnan().any() else box * scale.repeat(2)
    x1, y1, x2, y2 = (int(v) for v in torch.minimum(inside.floor().clamp(min=0), torch.tensor([W - 1, H - 1, W, H])))
    left, top = _integer(0, x1, rng), _integer(0, y1, rng)
    # A box of less than a pixel must still leave a pixel.
    right, bottom = _integer(max(x2, left + 1), W, rng), _integer(max(y2, top + 1), H, rng)
    corner, part = torch.tensor([left, top]), torch.tensor([right - left, bottom - top])
    moved = ((kps - corner) * (full / part)).clamp(min=torch.zeros(2), max=full - 1.0)
    mask = getattr(sample, f"{side}_mask")
    if mask.shape == (H, W):  # the mask of an object that may be anywhere is one cell
        mask = TF.resized_crop(mask[None], top, left, bottom - top, right - left, [H, W])[0]
    return sample._replace(
        **{
            f"{side}_img": TF.resized_crop(image, top, left, bottom - top, right - left, [H, W], antialias=True),
            f"{side}_kps": torch.where(sample.kps_mask[:, None], moved, kps),
            f"{side}_size": part / scale,
            f"{side}_box": box - (corner / scale).repeat(2),
            f"{side}_mask": mask,
        }
    )


def recolour(image: Tensor, rng: torch.Generator) -> Tensor:
    """ACTR's and LPMFlow's chain (train transform of the released code): seven changes in this order, each p = 0.2.

    Their code calls albumentations; these are torchvision's operations with the ranges that albumentations has by
    default. our choice, where the two differ: see each operation.

    Args:
        image: (3, H, W) uint8.
        rng: Where the randomness comes from.

    Returns:
        (3, H, W) uint8.
    """
    for change in (_grey, _posterize, _equalize, _sharpen, _brightness_contrast, _solarize, _jitter):
        if _chance(0.2, rng):
            image = change(image, rng)
    return image


def _grey(image: Tensor, rng: torch.Generator) -> Tensor:
    return TF.rgb_to_grayscale(image, num_output_channels=3)


def _posterize(image: Tensor, rng: torch.Generator) -> Tensor:
    return TF.posterize(image, bits=4)


def _equalize(image: Tensor, rng: torch.Generator) -> Tensor:
    """Each channel's histogram. torchvision rounds as PIL does, albumentations as OpenCV: a level apart."""
    return TF.equalize(image)


def _sharpen(image: Tensor, rng: torch.Generator) -> Tensor:
    """albumentations adds a in [0.2, 0.5] times (8 centre - neighbours) and darkens to 1 - a + a l, l in [0.5, 1].

    torchvision's factor f adds (f - 1) / 13 times the same difference, so f = 1 + 13 a; it leaves the border pixels,
    and values are clipped before they are darkened, not after.
    """
    a, lightness = _uniform(0.2, 0.5, rng), _uniform(0.5, 1.0, rng)
    return TF.adjust_brightness(TF.adjust_sharpness(image, 1 + 13 * a), 1 - a + a * lightness)


def _brightness_contrast(image: Tensor, rng: torch.Generator) -> Tensor:
    """x (1 + c) + 255 b, with c and b in [-0.2, 0.2]; torchvision has no such operation."""
    contrast, brightness = _uniform(0.8, 1.2, rng), _uniform(-0.2, 0.2, rng)
    return (image.float() * contrast + 255 * brightness).clamp(0, 255).to(torch.uint8)


def _solarize(image: Tensor, rng: torch.Generator) -> Tensor:
    return TF.solarize(image, threshold=128)


def _jitter(image: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation in [0.8, 1.2] and hue in [-0.2, 0.2], in random order.

    albumentations widened its hue range later; these are the defaults of the time of CATs.
    """
    changes: list[tuple[Callable[[Tensor, float], Tensor], float]] = [
        (TF.adjust_brightness, _uniform(0.8, 1.2, rng)),
        (TF.adjust_contrast, _uniform(0.8, 1.2, rng)),
        (TF.adjust_saturation, _uniform(0.8, 1.2, rng)),
        (TF.adjust_hue, _uniform(-0.2, 0.2, rng)),
    ]
    for k in torch.randperm(len(changes), generator=rng).tolist():
        change, amount = changes[k]
        image = change(image, amount)
    return image


def _chance(p: float, rng: torch.Generator) -> bool:
    return _uniform(0, 1, rng) < p


def _uniform(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _integer(low: int, high: int, rng: torch.Generator) -> int:
    """Uniform on low, ..., high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


for _name, _recipe in {"none": None, "flip": flip, "photometric": photometric, "cats": cats}.items():
    AUGMENTS.add(_name, _recipe)
