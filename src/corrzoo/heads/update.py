"""Learned features: a residual network that is without effect before training, and the loss of their scores."""

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from corrzoo.geometry import Size, bilinear_cells, sample, size_of
from corrzoo.types import Pair


class FeatureUpdate(nn.Module):
    """Maps (B, inputs, h, w) of an image -> the update of its features (B, outputs, h, w), at first zero.

    our choice: the first convolution starts orthogonal, so that the angles between features reach the bottlenecks.
    """

    def __init__(self, inputs: int, outputs: int, width: int, layers: int) -> None:
        super().__init__()
        self.project, self.out = nn.Conv2d(inputs, width, 1), nn.Conv2d(width, outputs, 1)
        nn.init.orthogonal_(self.project.weight)
        for parameter in (self.project.bias, *self.out.parameters()):
            assert parameter is not None
            nn.init.zeros_(parameter)
        self.blocks = nn.Sequential(LayerNorm2d(width), *(Bottleneck(width) for _ in range(layers)), LayerNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        return self.out(self.blocks(self.project(maps)))


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


def row_cross_entropy(logits: Tensor, pair: Pair, grid: Size) -> Tensor:
    """Cross-entropy (B, K) of each keypoint's row against the cells around its match, the mean of both ways.

    A keypoint's row is interpolated between cells. The probability of its match is spread bilinearly over four cells.

    Args:
        logits: (B, N, N) of every source cell against every target cell.
        pair: Keypoints in pixels of network images of one size.
        grid: (h, w) of both images, h * w = N.
    """
    image, found = size_of(pair.src_img), []
    for volume, kps, truth in (logits.mT, pair.src_kps, pair.trg_kps), (logits, pair.trg_kps, pair.src_kps):
        rows = sample(volume.unflatten(2, grid), kps, image)  # (B, K, N)
        cells, weights = bilinear_cells(truth, grid, image)  # (B, K, 4)
        found.append(-(weights * F.log_softmax(rows, 2).gather(2, cells)).sum(2))
    return (found[0] + found[1]) / 2
