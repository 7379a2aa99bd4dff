"""Evaluation of a model: predictions for annotated points in original pixels, and one metric per dataset."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corrzoo.backbones.cache import FeatureCache
from corrzoo.geometry import cell_centres, resize_points, size_of, transfer
from corrzoo.scoring.label_transfer import LabelTransfer, polygon_mask, warp_mask
from corrzoo.scoring.metric import BenchmarkMetric
from corrzoo.scoring.pck import PCK
from corrzoo.scoring.protocols import get_protocol
from corrzoo.types import Features, Pair, PointMatcher, ZooError

PairFeatures = Callable[[Pair], tuple[Features, Features]]


@torch.no_grad()
def predict_points(
    matcher: PointMatcher, pair: Pair, query: str = "src", features: PairFeatures | None = None
) -> Tensor:
    """Match the annotated points of a batch: (B, K, 2) float64 predictions in original pixels of the other image.

    The points are given in the image `query`: `src`, or `trg` for protocols that predict source points. `features`
    computes the prepared features of a batch; `matcher.features` by default.
    """
    asked = pair if query == "src" else pair.swapped()
    if not asked.src_kps.shape[1]:  # heads expect points
        return asked.src_kps.double()
    src, trg = (features or matcher.features)(asked)
    found = matcher.match_keypoints(src, trg, asked).double()
    return resize_points(found, size_of(asked.src_img)[::-1], asked.trg_size.double())


class Evaluation:
    """Metrics and feature cache of one pass over one or more datasets.

    Args:
        matcher: The model. Its features are computed once per image and dataset.
        loaders: One loader, or one per dataset.
        protocol: PCK protocol. Without a threshold kind, the dataset's own is added. Outlines need none.
        alphas: PCK tolerances.
        cache_mb: Size of the feature cache in MiB; 0 turns it off.
    """

    def __init__(
        self, matcher: PointMatcher, loaders: Any, protocol: str, alphas: Sequence[float], cache_mb: int
    ) -> None:
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        self.matcher, self.cache_bytes = matcher, cache_mb * 2**20
        self.datasets = [loader.dataset for loader in loaders]
        self.metrics: list[BenchmarkMetric] = []
        for dataset in self.datasets:
            metric: BenchmarkMetric
            if dataset.outlines:
                metric = LabelTransfer(dataset.categories)
            else:
                metric = PCK(get_protocol(protocol, dataset.threshold), alphas, dataset.categories)
            self.metrics.append(metric.to(matcher.device))
        self.release()

    def features(self, pair: Pair) -> tuple[Features, Features]:
        """Prepared features of both images, from the cache if possible."""
        if not (numbers := pair.image_numbers()):
            return self.matcher.features(pair)
        images = self.matcher.backbone.normalise(torch.cat([pair.src_img, pair.trg_img]))
        return self.cache(images, numbers, lambda new: self.matcher.prepare(self.matcher.backbone(new))).halves()

    def check_keypoints(self) -> None:
        """Raise ZooError if a dataset has outlines instead of keypoints to predict."""
        for dataset in self.datasets:
            if dataset.outlines:
                raise ZooError(f"{dataset.name} has no keypoints to predict: `lightning test` scores it")

    def predict(self, pair: Pair, which: int) -> Tensor:
        """(B, K, 2) predictions for a batch of dataset `which`, see `predict_points`."""
        self._enter(which)
        return predict_points(self.matcher, pair, self.metrics[which].query, self.features)

    def score(self, pair: Pair, which: int) -> None:
        """Add a batch of dataset `which` to its metric."""
        if self.datasets[which].outlines:
            self._enter(which)
            self._score_outlines(pair, which)
        else:
            self.metrics[which].update(self.predict(pair, which), pair)

    def scores(self, stage: str) -> dict[str, float]:
        """Headline scores: `<stage>/pck@0.1`, or `<stage>/<dataset>/pck@0.1` for several datasets."""
        out: dict[str, float] = {}
        for name, metric in self.by_name():
            prefix = stage if len(self.metrics) == 1 else f"{stage}/{name}"
            out |= {f"{prefix}/{key}": value.item() for key, value in metric.compute().items() if "/" not in key}
        return out

    def release(self) -> None:
        """Empty the feature cache."""
        self._current, self.cache = -1, FeatureCache(0)

    def by_name(self) -> list[tuple[str, BenchmarkMetric]]:
        """Name and metric of each dataset."""
        return [(dataset.name, metric) for dataset, metric in zip(self.datasets, self.metrics, strict=True)]

    def _enter(self, which: int) -> None:
        if which != self._current:  # datasets use the same image numbers
            self._current, self.cache = which, FeatureCache(self.cache_bytes)

    @torch.no_grad()
    def _score_outlines(self, pair: Pair, which: int) -> None:
        """Transfer outlines in both ways: source vertices to the target, and target pixels to the source mask."""
        src, trg = self.features(pair)
        image = size_of(src.image)
        records = [self.datasets[which].record(index) for index in pair.index.tolist()]
        vertices = [resize_points(r.src_polygon, r.src_size, image[::-1]).float() for r in records]
        padded = pad_sequence(vertices, batch_first=True).to(src.image.device)
        matched = self.matcher.match_points(src, trg, padded).cpu().double()
        back = self.matcher.match(trg, src).flow.cpu().float()
        for k, r in enumerate(records):
            polygon = resize_points(matched[k, : len(vertices[k])], image[::-1], r.trg_size)
            w, h = r.trg_size
            seen = transfer(cell_centres((h, w), image)[None], back[k : k + 1], image)[0].double()
            seen = resize_points(seen, image[::-1], r.src_size).unflatten(0, (h, w))
            mask, gt = warp_mask(polygon_mask(r.src_polygon, r.src_size), seen), polygon_mask(r.trg_polygon, r.trg_size)
            index, category = int(pair.index[k]), int(pair.category[k])
            self.metrics[which].update(polygon_mask(polygon, r.trg_size), mask, gt, index, category)
