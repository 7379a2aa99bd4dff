"""The LightningModule under every head: shared steps, optimiser groups, feature reuse, logging.

A head implements `match(src, trg) -> Match`. It may override `prepare`, `loss`, `match_points` and `param_groups`.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corrzoo.backbones import Backbone
from corrzoo.callbacks import PICTURES, MatchImages, ResultsWriter, describe_training
from corrzoo.feature_cache import FeatureCache
from corrzoo.geometry import Size, cell_centres, pseudo_flow, resize_points, sample, size_of, transfer
from corrzoo.imagepair import ImageMatches, ImagePair
from corrzoo.images import ImageSource, as_rgb, to_tensor
from corrzoo.losses import endpoint_error, over_processes, processes
from corrzoo.metrics import PCK, BenchmarkMetric, LabelTransfer, polygon_mask, warp_mask
from corrzoo.protocols import check_protocol
from corrzoo.resume import StopSignals
from corrzoo.types import Features, Match, Pair, ZooError

CATS_RADIUS = 17
"""Half the side of the square that a keypoint supervises: CATs' receptive field of 35, in images of 512 px."""


class Matcher(LightningModule, ABC):
    """A backbone and a matching head, trained and evaluated the same way for every head.

    Args:
        backbone: A name of `list_backbones()`, or any timm model as `timm/<name>`.
        weights: `pretrained`, `random`, or the path of a local file.
        levels: Feature levels: block numbers (negative from the end), or CNN modules such as `layer3.22`.
            The last level when not given.
        finetune: What of the backbone trains: `all`, `none`, or the number of its last blocks.
        pos_interp: How a ViT's position embedding is resized: `official` as its authors do, `timm`, or the
            backbone's own default when not given.
        resize: The side that the backbone sees, when it differs from the network image's; true for the nearest
            size that its patch divides.
        sha256: Checksum that a local weight file must have.
        lr: Learning rate of the head (ViTSC 5.2: 3e-5).
        backbone_lr: Learning rate of the backbone (ViTSC 5.2: 3e-6).
        optimizer: Which optimiser (ViTSC 5.2: Adam).
        weight_decay: Decay of every parameter.
        schedule: Learning rate over the epochs: `constant`, `cosine` (to zero at the last epoch), or `step`.
        milestones: Epochs at which `step` multiplies the rate by `gamma`.
        gamma: The factor of `step`.
        protocol: How PCK is scored, a name of `list_protocols()`; without a threshold kind (`default`,
            `actr`) the dataset's customary kind is added.
        alphas: PCK thresholds as shares of the reference length.
        backend: Which implementation of the correlation runs: `auto`, `torch` or `triton`.
        feature_cache_mb: Memory for features that are computed once an image: in evaluation, and as much again in
            training with a frozen backbone (`finetune: none`) and without augmentation; 0 turns reuse off.
    """

    hparams: Any  # what save_hyperparameters() keeps: the options above, by name

    evaluation_options: ClassVar[frozenset[str]] = frozenset({"protocol", "alphas", "backend", "feature_cache_mb"})
    """Options that may differ between a checkpoint's training and its evaluation."""

    image_size: int | Size = 224
    """Side of the square network image for images of one's own, or its (H, W): training and `load` set it."""
    trained: dict[str, Any] | None = None
    """What the weights have learnt from, as training left it or the checkpoint says that `load` read."""

    def __init__(
        self,
        backbone: str = "dinov2_b14",
        weights: str = "pretrained",
        levels: list[int | str] | None = None,
        finetune: int | Literal["all", "none"] = "all",
        pos_interp: Literal["official", "timm"] | None = None,
        resize: bool | int | None = None,
        sha256: str | None = None,
        lr: float = 3e-5,
        backbone_lr: float = 3e-6,
        optimizer: Literal["adam", "adamw"] = "adam",
        weight_decay: float = 0.0,
        schedule: Literal["constant", "cosine", "step"] = "constant",
        milestones: list[int] | None = None,
        gamma: float = 0.5,
        protocol: str = "default",
        alphas: tuple[float, ...] = (0.05, 0.1, 0.15),
        backend: Literal["auto", "torch", "triton"] = "auto",
        feature_cache_mb: int = 1024,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_protocol(protocol)
        if not alphas or min(alphas) <= 0:
            raise ZooError(f"alphas {list(alphas)}: expected at least one, all above 0")
        if feature_cache_mb < 0:
            raise ZooError(f"feature_cache_mb {feature_cache_mb}: expected 0 or more")
        self.backbone = Backbone(
            backbone,
            weights=weights,
            levels=levels,
            finetune=finetune,
            pos_interp=pos_interp,
            resize=resize or False,
            sha256=sha256,
        )
        self.backend = backend
        self._cache: FeatureCache | None = None  # lives while one dataset is evaluated with one set of weights
        self._training_cache: FeatureCache | None = None  # what a frozen backbone made of the training images
        self._metrics: list[BenchmarkMetric] = []
        self._random: dict[str, Tensor] = {}  # of a checkpoint, until training begins
        self.scores: dict[str, float] = {}
        """The last epoch's PCK, by the name it was logged under; also those of a sanity check, which logs nothing."""

    # ------------------------------------------------------------------ what a head provides

    @abstractmethod
    def match(self, src: Features, trg: Features) -> Match:
        """Match prepared features: where does each cell of the source grid go in the target?"""

    def prepare(self, features: Features) -> Features:
        """What a head does with one image alone, before it sees the other; kept with the features in evaluation."""
        return features

    def loss(self, match: Match, pair: Pair) -> Tensor | dict[str, Tensor]:
        """EPE (ViTSC eq. 6) against the pseudo-flow around the keypoints, in cells of the flow's grid.

        The paper leaves the neighbourhood's size open. our choice: CATs' share of the image, but never less than CATs'
        share of a cell (17 px of its coarsest grid's 32), so that every keypoint supervises the cell it lies in.

        Returns:
            A scalar, or named terms whose entry `loss` is the one to minimise.
        """
        image, grid = size_of(pair.src_img), size_of(match.flow)
        stride = max(image) / max(grid)
        radius = CATS_RADIUS * max(max(image) / 512, stride / 32)
        target, mask = pseudo_flow(pair.src_kps, pair.trg_kps, pair.kps_mask, grid, image, radius)
        return endpoint_error(match.flow / stride, target / stride, mask)

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Matches of source points alone: (B, n, 2) -> (B, n, 2), in pixels of the network image.

        The default reads the dense flow; a head that can answer single points for less overrides it.
        """
        return transfer(points, self.match(src, trg).flow, size_of(src.image))

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups: backbones at their own learning rate, all the rest at the head's."""
        in_backbone = {id(p) for backbone in self.backbones() for p in backbone.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"name": "head", "params": [p for p in trained if id(p) not in in_backbone], "lr": self.hparams.lr},
            {
                "name": "backbone",
                "params": [p for p in trained if id(p) in in_backbone],
                "lr": self.hparams.backbone_lr,
            },
        ]
        return [g for g in groups if g["params"]]

    def backbones(self) -> list[Backbone]:
        """The backbone, and those that a head has beside it."""
        return [module for module in self.modules() if isinstance(module, Backbone)]

    # ------------------------------------------------------------------ forward

    def forward(self, src_img: Tensor, trg_img: Tensor) -> Match:
        """Match two batches of images, (B, 3, H, W) each: uint8 pixels, or floats normalised for the backbone."""
        return self.match(*self.features_of(src_img, trg_img))

    def features_of(self, src_img: Tensor, trg_img: Tensor, ids: Tensor | None = None) -> tuple[Features, Features]:
        """Prepared features of source and target; with the (2B,) numbers of the images, some may be known already."""
        images = torch.cat([src_img, trg_img])
        if self._training_cache is None or ids is None or (ids < 0).any():
            return _halves(self.prepare(self.backbone(images)))
        return _halves(self.prepare(self._training_cache(self.backbone.normalise(images), ids, self.backbone)))

    def _cached_features_of(self, pair: Pair) -> tuple[Features, Features]:
        ids = torch.cat([pair.src_id, pair.trg_id])
        if self._cache is None or (ids < 0).any():
            return self.features_of(pair.src_img, pair.trg_img)
        images = self.backbone.normalise(torch.cat([pair.src_img, pair.trg_img]))
        return _halves(self._cache(images, ids, lambda fresh: self.prepare(self.backbone(fresh))))

    @torch.no_grad()
    def predict_points(self, pair: Pair, query: str = "src") -> Tensor:
        """Matches of a batch's annotated points: (B, K, 2) in original pixels of the image that is answered.

        Args:
            pair: The batch.
            query: Which image's points are asked for: `src`, or `trg` for protocols that go the other way.
        """
        asked = pair if query == "src" else pair.swapped()
        src, trg = self._cached_features_of(asked)
        points = self.match_points(src, trg, asked.src_kps)
        H, W = asked.src_img.shape[-2:]
        return resize_points(points.double(), asked.trg_size.new_tensor([W, H]).double(), asked.trg_size.double())

    # ------------------------------------------------------------------ images of one's own, and what to look at

    @torch.no_grad()
    def open_images(self, src: ImageSource, trg: ImageSource, size: int | Size | None = None) -> ImagePair:
        """Two images of any size with their features, to ask for points, dense flow and heat maps.

        The matcher goes into evaluation mode, and loads its backbone's weights if they are not there.

        Args:
            src: Where points are asked: a path (turned upright), a PIL image, or uint8 pixels, see `as_rgb`.
            trg: Where they are answered.
            size: Side of the square network image, or its (H, W); `image_size` when not given.

        Raises:
            ZooError: for what is no image.
        """
        self.eval().load_weights()
        size = size or self.image_size
        H, W = (size, size) if isinstance(size, int) else size
        images = as_rgb(src), as_rgb(trg)
        seen = [to_tensor(image, (H, W)).to(self.device) for image in images]
        return ImagePair(self, *images, *self.features_of(seen[0].unsqueeze(0), seen[1].unsqueeze(0)))

    def match_images(
        self, src: ImageSource, trg: ImageSource, points: object = None, size: int | Size | None = None
    ) -> ImageMatches:
        """Matches between two images of any size, in their own pixels.

        Args:
            src: See `open_images`, like trg and size.
            trg: See `open_images`.
            points: (n, 2) points (x, y) of the source. When not given, a regular grid is tried, and those of its
                points are answered that are matched back to where they came from.
            size: See `open_images`.

        Raises:
            ZooError: for what is no image, and for points outside the source.
        """
        pair = self.open_images(src, trg, size)
        return pair.confident_matches() if points is None else pair.match_both_ways(points)

    def heat_maps(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Scores of the target's cells for source points (B, n, 2) in pixels of the network image: (B, n, h, w).

        They are the correlation that the head keeps, read between the four cells around a point; for a head that keeps
        none, the cosines of its features there.
        """
        correlation, image = self.match(src, trg).correlation, size_of(src.image)
        if correlation is None:
            return cosine_maps(src.maps[0], trg.maps[0], points, image)
        columns = correlation.mT.unflatten(2, _grid_of(correlation.shape[1], src))  # (B, M, h, w)
        return sample(columns, points, image).unflatten(2, _grid_of(correlation.shape[2], trg))

    def foreground_maps(self, src_img: Tensor, trg_img: Tensor) -> Tensor:
        """How much each cell of the source looks like what both images show (LPMFlow's supplement, 1.2).

        The cosine of the last level with the mean of the two class tokens, from 0 to 1 in each image.

        Args:
            src_img: (B, 3, H, W), like trg_img: see `forward`.
            trg_img: The other images.

        Returns:
            (B, h, w).

        Raises:
            ZooError: when the backbone has no class token. The mean of the cells would be that of the background.
        """
        seen = self.backbone(torch.cat([src_img, trg_img]))
        if seen.cls is None:
            raise ZooError(f"{self.backbone.spec.key} has no class token to tell the foreground by: take a ViT")
        shared = F.normalize(sum(seen.cls.chunk(2)), dim=1)
        heat = torch.einsum("bchw,bc->bhw", F.normalize(seen.maps[-1][: len(src_img)], dim=1), shared)
        low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
        return (heat - low) / (high - low).clamp(min=1e-12)

    # ------------------------------------------------------------------ steps

    def training_step(self, pair: Pair, batch_idx: int) -> Tensor:
        """One step of Lightning's loop; a loss that is not finite ends the run and names its pairs."""
        ids = torch.cat([pair.src_id, pair.trg_id])
        terms = self.loss(self.match(*self.features_of(pair.src_img, pair.trg_img, ids)), pair)
        terms = terms if isinstance(terms, dict) else {"loss": terms}
        values = over_processes(torch.stack(list(terms.values()))) / processes()  # those of the joined batch
        shown = {f"train/{name}": value for name, value in zip(terms, values, strict=True)}
        if not torch.isfinite(shown["train/loss"]):  # in every process, so that none waits for one that has left
            pairs = self.all_gather(pair.index)
            assert isinstance(pairs, Tensor)
            raise ZooError(
                f"the loss is {shown['train/loss'].item()} at step {self.global_step} on the pairs "
                f"{pairs.flatten().tolist()}: "
                "lower --model.lr and --model.backbone_lr, or look at these pairs with dataset.record(i)"
            )
        self.log_dict(shown, prog_bar=True, batch_size=len(pair.index))
        return terms["loss"]

    def on_train_start(self) -> None:
        """Begin to keep what a frozen backbone makes of image files, and go on with a resumed run's random numbers."""
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        files = getattr(dataset, "images", None)  # rendered images do not come back
        kept = self.hparams.feature_cache_mb if files and self.backbone.finetune == "none" else 0
        self._training_cache = FeatureCache(kept * 2**20) if kept else None
        if self._random:
            torch.set_rng_state(self._random["cpu"])
            if torch.cuda.is_available() and "cuda" in self._random:
                torch.cuda.set_rng_state(self._random["cuda"])
            self._random = {}

    def on_train_epoch_start(self) -> None:
        """Tell the pairs which epoch it is: augmentation and rendering go on from it."""
        dataset: Any = getattr(self.trainer.train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self.current_epoch)

    def on_validation_start(self) -> None:
        self.load_weights()
        self._start_scoring(self.trainer.val_dataloaders)

    def validation_step(self, pair: Pair, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch."""
        self._score(pair, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")
        self._cache = None

    def on_test_start(self) -> None:
        self.load_weights()
        self._start_scoring(self.trainer.test_dataloaders)

    def test_step(self, pair: Pair, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch."""
        self._score(pair, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")
        self._cache = None

    def on_predict_start(self) -> None:
        self.load_weights()
        self._start_scoring(self.trainer.predict_dataloaders)
        for dataset in self._datasets:
            if dataset.outlines:
                raise ZooError(f"{dataset.name} has no keypoints to find matches of: `lightning test` scores it")

    def on_predict_epoch_end(self) -> None:
        self._cache = None

    def predict_step(self, pair: Pair, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Matches of the keypoints in original pixels of the image that the protocol evaluates, and whose they are."""
        self._enter(dataloader_idx)
        points = self.predict_points(pair, self._metrics[dataloader_idx].query)
        return {"index": pair.index, "points": points, "kps_mask": pair.kps_mask}

    def metrics_by_dataset(self) -> list[tuple[str, BenchmarkMetric]]:
        """The names of the datasets that were scored last, and their metrics."""
        return list(zip(self._dataset_names, self._metrics, strict=True))

    def _start_scoring(self, loaders: Any) -> None:
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        datasets = [loader.dataset for loader in loaders]
        self._datasets, self._dataset_names = datasets, [dataset.name for dataset in datasets]
        self._metrics = [self._metric_for(dataset).to(self.device) for dataset in datasets]
        self._dataset = -1

    def _metric_for(self, dataset: Any) -> BenchmarkMetric:
        if dataset.outlines:
            return LabelTransfer(dataset.categories)
        return PCK(self._protocol_for(dataset.threshold), self.hparams.alphas, dataset.categories)

    def _enter(self, dataset: int) -> None:
        """Begin a new cache with each dataset: every dataset numbers its images anew."""
        if dataset != self._dataset:  # a cache of no bytes keeps nothing, but computes as any other does
            self._dataset, self._cache = dataset, FeatureCache(self.hparams.feature_cache_mb * 2**20)

    def _protocol_for(self, threshold: str) -> str:
        protocol = self.hparams.protocol
        return protocol if ":" in protocol else f"{protocol}:{threshold}"

    def _score(self, pair: Pair, which: int) -> None:
        self._enter(which)
        metric, dataset = self._metrics[which], self._datasets[which]
        if dataset.outlines:
            self._score_outlines(pair, dataset, metric)
        else:
            metric.update(self.predict_points(pair, metric.query), pair)

    @torch.no_grad()
    def _score_outlines(self, pair: Pair, dataset: Any, metric: BenchmarkMetric) -> None:
        """Carry outlines over in both readings: vertices go to the target, and target pixels look into the source."""
        src, trg = self._cached_features_of(pair)
        image = size_of(src.image)
        records = [dataset.record(index) for index in pair.index.tolist()]
        vertices = [resize_points(r.src_polygon, _wh(r.src_size), _wh(image[::-1])).float() for r in records]
        carried = self.match_points(src, trg, pad_sequence(vertices, batch_first=True).to(self.device)).cpu().double()
        back = self.match(trg, src).flow.cpu().float()
        for k, r in enumerate(records):
            polygon = resize_points(carried[k, : len(vertices[k])], _wh(image[::-1]), _wh(r.trg_size))
            (w, h) = r.trg_size
            seen = transfer(cell_centres((h, w), image)[None], back[k : k + 1], image)[0].double()
            seen = resize_points(seen, _wh(image[::-1]), _wh(r.src_size)).unflatten(0, (h, w))
            mask = warp_mask(polygon_mask(r.src_polygon, r.src_size), seen)
            gt, where = polygon_mask(r.trg_polygon, r.trg_size), (int(pair.index[k]), int(pair.category[k]))
            metric.update(polygon_mask(polygon, r.trg_size), mask, gt, *where)

    def _log_scores(self, stage: str) -> None:
        self.scores = {}
        for name, metric in self.metrics_by_dataset():
            prefix = stage if len(self._metrics) == 1 else f"{stage}/{name}"
            headline = {key: value for key, value in metric.compute().items() if "/" not in key}
            self.scores |= {f"{prefix}/{key}": value.item() for key, value in headline.items()}
        self.log_dict(self.scores)  # the metric has synchronised already

    # ------------------------------------------------------------------ what Lightning asks for

    def setup(self, stage: str) -> None:
        """Refuse a precision that annotations do not survive, and have Lightning count epochs."""
        if self.trainer.precision in ("bf16-true", "16-true"):
            mixed = self.trainer.precision.replace("true", "mixed")
            raise ZooError(f"--trainer.precision {self.trainer.precision} rounds coordinates, too: give {mixed}")
        # With max_steps it goes on behind an epoch's last step with an epoch that is empty, and all others move on.
        self.trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_fit_start(self) -> None:
        self.load_weights()  # not in setup(): only now has a checkpoint brought its own, and nothing needs fetching

    def on_fit_end(self) -> None:
        self._training_cache = None
        self.trained = describe_training(self.trainer) or self.trained
        self.image_size = (self.trained or {}).get("size") or self.image_size

    def load_weights(self) -> "Matcher":
        """Load the backbones' weights that were asked for, if that has not happened yet."""
        for backbone in self.backbones():
            backbone.load()
        return self

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or Adam over `param_groups()`, and the schedule."""
        groups = self.param_groups()
        if not groups:
            raise ZooError(
                "nothing to train: no parameter asks for a gradient; set --model.finetune to `all` or a number"
            )
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.hparams.optimizer]
        optimizer = kind(groups, weight_decay=self.hparams.weight_decay)
        epochs = self.trainer.max_epochs or 1
        if self.hparams.schedule == "cosine":
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)]
        if self.hparams.schedule == "step":
            milestones = self.hparams.milestones or []
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, self.hparams.gamma)]
        return optimizer

    def configure_callbacks(self) -> list[Callback]:
        """Every run writes its results, predictions come with pictures, and signals stop a run well.

        A callback of the same kind in `--trainer.callbacks` stands instead: Lightning would drop that one.
        """
        own = [ResultsWriter(), MatchImages(kinds=list(PICTURES), stages=["predict"]), StopSignals()]
        return [c for c in own if not any(isinstance(given, type(c)) for given in self.trainer.callbacks)]  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["head"], checkpoint["module"] = type(self).__name__, type(self).__module__
        # One process's: all draw alike. What data and augmentation draw depends on seed, epoch and pair alone.
        checkpoint["random"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            checkpoint["random"]["cuda"] = torch.cuda.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random = {name: state.cpu() for name, state in checkpoint.get("random", {}).items()}


def cosine_maps(src: Tensor, trg: Tensor, points: Tensor, image: Size) -> Tensor:
    """Cosines (B, n, h, w) of the source's features (B, C, h', w') at points (B, n, 2) with those of the target."""
    rows = F.normalize(sample(src, points, image), dim=2)
    return torch.einsum("bnc,bchw->bnhw", rows, F.normalize(trg, dim=1))


def _grid_of(cells: int, features: Features) -> Size:
    """(h, w) of so many cells: the grid of the prepared features, or one that is finer on both axes alike."""
    h, w = size_of(features.maps[0])
    finer = round((cells / (h * w)) ** 0.5)
    return h * finer, w * finer


def _wh(size: tuple[int, int]) -> Tensor:
    """A size (w, h) as points are resized by."""
    return torch.tensor(size, dtype=torch.float64)


def _halves(both: Features) -> tuple[Features, Features]:
    """The features of source and target that were computed as one batch."""
    half = len(both.image) // 2
    src_cls, trg_cls = (None, None) if both.cls is None else (both.cls[:half], both.cls[half:])
    return (
        Features(both.image[:half], [level[:half] for level in both.maps], src_cls),
        Features(both.image[half:], [level[half:] for level in both.maps], trg_cls),
    )
