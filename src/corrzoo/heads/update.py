"""Learned features: a residual network that is without effect before training, and the loss of their scores."""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from corrzoo.geometry import Size, bilinear_cells, check_keypoints, sample, size_of
from corrzoo.heads.levels import COLDEST
from corrzoo.precision import full
from corrzoo.types import Pair, ZooError


class FeatureUpdate(nn.Module):
    """Updated features of an image: x + U(x), where U(x) is zero before training.

    With `mirror`, a map (B, 2C, h, w) has the features of the image, and those of its mirror image flipped back. U sees
    both, and updates the former. The latter are updated by the same weights from the mirror image's map. So the updated
    map of the mirror image is the updated map, mirrored.

    Args:
        channels: C.
        mirror: Whether maps have 2C channels.
        width: Channels of U.
        layers: Bottlenecks of U. our choice: the convolution before them starts orthogonal, which keeps most angles.
    """

    def __init__(self, channels: int, mirror: bool, width: int, layers: int) -> None:
        super().__init__()
        if width % 16:  # groups of the normalisation
            raise ZooError(f"width {width}: expected a multiple of 16")
        self.mirror = mirror
        self.project = nn.Conv2d(channels * (1 + mirror), width, 1)
        self.blocks = nn.Sequential(LayerNorm2d(width), *(Bottleneck(width) for _ in range(layers)), LayerNorm2d(width))
        self.out = nn.Conv2d(width, channels, 1)
        nn.init.orthogonal_(self.project.weight)
        for parameter in (self.project.bias, *self.out.parameters()):
            assert parameter is not None
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor, strength: float = 1.0) -> Tensor:
        """Maps (B, C, h, w), or (B, 2C, h, w) with `mirror` -> the same: x + strength U(x)."""
        update = self.updates(maps)
        if self.mirror:
            update = torch.cat([update, self.updates(mirror_image(maps)).flip(-1)], 1)
        return torch.add(maps, update, alpha=strength)

    def updates(self, maps: Tensor) -> Tensor:
        """U (B, C, h, w)."""
        return full(self.out(self.blocks(self.project(maps))))


def mirror_image(maps: Tensor) -> Tensor:
    """The map (B, 2C, h, w) of the mirror image: flipped, with its halves exchanged."""
    own, other = maps.chunk(2, 1)
    return torch.cat([other, own], 1).flip(-1)


class Bottleneck(nn.Sequential):
    """ResNet's bottleneck (B, C, h, w) -> the same, pre-normalised and residual."""

    def __init__(self, width: int) -> None:
        half = width // 2
        super().__init__(
            nn.GroupNorm(1, width), nn.Conv2d(width, half, 1),
            nn.GroupNorm(8, half), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1),
            nn.GroupNorm(8, half), nn.ReLU(), nn.Conv2d(half, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def row_cross_entropy(scores: Tensor, temperature: float | Tensor, pair: Pair, grid: Size) -> Tensor:
    """Cross-entropy (B, K) of each keypoint's match, the mean of source to target and target to source.

    A keypoint's scores against all cells of the other image are interpolated bilinearly from the four cells around it.
    A softmax over the other image's cells makes them probabilities. The label is the keypoint's position there: the
    bilinear weights of the four cells around it, which sum to one.

    Args:
        scores: (B, N, N) of every source cell against every target cell.
        temperature: Of the softmax. A learned one below `COLDEST` counts as `COLDEST`.
        pair: Keypoints in pixels of network images of one size.
        grid: (h, w) of both images, h * w = N.
    """
    check_keypoints(pair.src_kps)
    logits = scores / (temperature.clamp(min=COLDEST) if isinstance(temperature, Tensor) else temperature)
    image, found = size_of(pair.src_img), []
    for volume, kps, truth in (logits.mT, pair.src_kps, pair.trg_kps), (logits, pair.trg_kps, pair.src_kps):
        rows = sample(volume.unflatten(2, grid), kps, image)  # (B, N, h, w) read at K points: (B, K, N)
        cells, weights = bilinear_cells(truth, grid, image)  # (B, K, 4)
        found.append(-(weights * F.log_softmax(rows, 2).gather(2, cells)).sum(2))
    return (found[0] + found[1]) / 2
