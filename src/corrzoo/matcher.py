"""The LightningModule of every head: backbone, training step, evaluation steps and optimiser.

A head implements `match(src, trg) -> Match` and may override `prepare`, `loss`, `match_points`, `heat_maps` and
`param_groups`. Scoring is in `evaluation`, matching of image files in `inference`, result files in `callbacks`.
"""

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from corrzoo import inference
from corrzoo.backbones import Backbone
from corrzoo.backbones.cache import FeatureCache
from corrzoo.callbacks import default_callbacks
from corrzoo.callbacks.describe import describe_training
from corrzoo.callbacks.finite import FiniteLoss
from corrzoo.geometry import Size, cosine_maps, pseudo_flow, sample, size_of, transfer
from corrzoo.images import ImageSource
from corrzoo.losses import Term, endpoint_errors, mean_where, over_processes, processes
from corrzoo.optimizers import create_optimizer, create_schedule
from corrzoo.registry import Registry
from corrzoo.scoring.evaluation import Evaluation
from corrzoo.scoring.protocols import check_protocol
from corrzoo.types import Features, Match, Pair, ZooError

RADIUS = 17
"""Half the side of the square that a keypoint supervises: 35 px in images of 512 px, as ACTR and LPMFlow."""


class Matcher(LightningModule, ABC):
    """A backbone and a matching head, trained and evaluated the same way for every head.

    Args:
        backbone: A name of `list_backbones()`, or any timm model as `timm/<name>`.
        weights: `pretrained`, `random`, or the path of a local file.
        levels: Feature levels: block numbers (negative from the end), or CNN modules such as `layer3.22`, and
            `layer3.22:pre` for the map before that block's last ReLU. The last level when not given.
        finetune: Which part of the backbone is trained: `all`, `none`, or the number of its last blocks.
        pos_interp: How a ViT's position embedding is resized: `official` (authors') or `timm`. Default: the backbone's.
        backbone_size: Image side for the backbone if it differs from the network image; true for the nearest
            multiple of its patch.
        lr: Learning rate of the head (ViTSC 5.2: 3e-5).
        backbone_lr: Learning rate of the backbone (ViTSC 5.2: 3e-6).
        optimizer: Which optimiser (ViTSC 5.2: Adam).
        weight_decay: Weight decay of all parameters.
        schedule: Learning rate: `constant`, `cosine` (to zero), `one-cycle` (up, then to zero) or `step` (by epochs).
        warmup_steps: Optimiser steps over which the rate rises linearly, for `constant` and `cosine`.
        milestones: Epochs at which `step` multiplies the rate by `gamma`.
        gamma: The factor of `step`.
        protocol: PCK protocol, a name of `list_protocols()`; without a threshold kind, the dataset's own is added.
        alphas: PCK thresholds as shares of the reference length.
        backend: Which implementation of the correlation's read-out runs: `auto`, `torch` or `triton`. It concerns
            ViTSC, Baseline without `mutual`, and GeoAware unless it reads a `window` with `outside: zero`; others read
            out a volume that they have in memory.
        compile: Compile backbones and head by `torch.compile`. The first steps take minutes.
        feature_cache_mb: Size in MB of the cache of image features: in evaluation, and as much again in training with
            a frozen backbone (`finetune: none`) and without augmentation; 0 turns it off. In training it does not hold
            MirrorGuided's mirror images, nor what TransforMatcher's second backbone computes.
    """

    hparams: Any
    evaluation_options: ClassVar[frozenset[str]] = frozenset("protocol alphas backend compile feature_cache_mb".split())
    """Options that may differ between a checkpoint's training and its evaluation."""
    image_size: int | Size = 224
    """Network image for inference: its side or (H, W)."""
    evaluation: Any
    """The `Evaluation` of the last pass over datasets; None in a training run before its first validation."""
    trained: dict[str, Any] | None = None
    """What the weights were trained on; None when they were not."""
    before: str | None = None
    """Dataset of an earlier training, whose weights the training began with."""

    def __init__(
        self,
        backbone: str = "dinov2_b14",
        weights: str = "pretrained",
        levels: list[int | str] | None = None,
        finetune: int | Literal["all", "none"] = "all",
        pos_interp: Literal["official", "timm"] | None = None,
        backbone_size: bool | int | None = None,
        lr: float = 3e-5,
        backbone_lr: float = 3e-6,
        optimizer: Literal["adam", "adamw"] = "adam",
        weight_decay: float = 0.0,
        schedule: Literal["constant", "cosine", "one-cycle", "step"] = "constant",
        warmup_steps: int = 0,
        milestones: list[int] | None = None,
        gamma: float = 0.5,
        protocol: str = "default",
        alphas: tuple[float, ...] = (0.05, 0.1, 0.15),
        backend: Literal["auto", "torch", "triton"] = "auto",
        compile: bool = False,
        feature_cache_mb: int = 1024,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_protocol(protocol)
        if not alphas or min(alphas) <= 0:
            raise ZooError(f"alphas {list(alphas)}: expected at least one, all above 0")
        if feature_cache_mb < 0:
            raise ZooError(f"feature_cache_mb {feature_cache_mb}: expected 0 or more")
        self.backbone = Backbone(backbone, weights, levels, finetune, pos_interp, backbone_size or False)
        self.backend = backend
        self.scores: dict[str, float] = {}
        """Headline numbers of the last evaluation, as logged."""
        self._training_features: FeatureCache | None = None

    @property
    def head_name(self) -> str:
        """Name that the head is registered under; its class name if it is not registered."""
        return HEADS.name_of(type(self))

    @property
    def title(self) -> str:
        """Head and backbone in words: "ACTR on ibot_b16"."""
        return f"{self.head_name} on {self.hparams.backbone}"

    # ------------------------------------------------------------------ what a head provides

    @abstractmethod
    def match(self, src: Features, trg: Features) -> Match:
        """Match prepared features: the flow from every source cell to the target."""

    def prepare(self, features: Features) -> Features:
        """Per-image processing before matching; its result is cached in evaluation."""
        return features

    def loss(self, match: Match, pair: Pair) -> Tensor | dict[str, Tensor]:
        """EPE (ViTSC eq. 6) against the pseudo-flow around the keypoints, in cells of the flow's grid.

        Returns:
            A scalar, or named terms of which `loss` is minimised.
        """
        return mean_where(*self.keypoint_errors(match, pair))

    def keypoint_errors(self, match: Match, pair: Pair, radius: float | None = None) -> Term:
        """Distance of the flow from the pseudo-flow (B, h, w), in cells, and which cells a keypoint supervises.

        A keypoint supervises the cells in a square around it; `radius` is half the square's side in cells. our choice
        where a paper gives none: ACTR's and LPMFlow's share of the image (CATs has twice as much), and at least 17/32
        of a cell, so that every keypoint supervises the cell it lies in. The released code of CATs, ACTR and LPMFlow
        leaves out a cell that its keypoint does not move. our choice: it counts.
        """
        image, grid = size_of(pair.src_img), size_of(match.flow)
        stride = max(image) / max(grid)
        pixels = stride * radius if radius else RADIUS * max(max(image) / 512, stride / 32)
        target, mask = pseudo_flow(pair.src_kps, pair.trg_kps, pair.kps_mask, grid, image, pixels)
        return endpoint_errors(match.flow / stride, target / stride, mask)

    def match_points(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """(B, n, 2) source points -> (B, n, 2) matches, in network pixels; by default read from the dense flow."""
        return transfer(points, self.match(src, trg).flow, size_of(src.image))

    def match_keypoints(self, src: Features, trg: Features, pair: Pair) -> Tensor:
        """(B, K, 2) matches of a batch's source keypoints, by `match_points`. A head may ask which parts they mark."""
        return self.match_points(src, trg, pair.src_kps)

    def heat_maps(self, src: Features, trg: Features, points: Tensor) -> Tensor:
        """(B, n, h, w) scores of target cells for (B, n, 2) source points: the correlation, else feature cosines."""
        correlation, image = self.match(src, trg).correlation, size_of(src.image)
        if correlation is None:
            return cosine_maps(src.maps[0], trg.maps[0], points, image)
        rows = correlation.mT.unflatten(2, _grid_of(correlation.shape[1], src))  # (B, M, h, w)
        return sample(rows, points, image).unflatten(2, _grid_of(correlation.shape[2], trg))

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: backbones at `backbone_lr`, everything else at `lr`."""
        in_backbone = {id(p) for backbone in self.backbones() for p in backbone.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        head = [p for p in trained if id(p) not in in_backbone]
        backbone = [p for p in trained if id(p) in in_backbone]
        groups = [("head", head, self.hparams.lr), ("backbone", backbone, self.hparams.backbone_lr)]
        return [{"name": name, "params": params, "lr": lr} for name, params, lr in groups if params]

    def forward(self, src_img: Tensor, trg_img: Tensor) -> Match:
        """Match two batches of images (B, 3, H, W): uint8, or float normalised for the backbone."""
        return self.match(*self.features_of(src_img, trg_img))

    def features_of(self, src_img: Tensor, trg_img: Tensor) -> tuple[Features, Features]:
        """Prepared features of two batches of images."""
        return self.prepare(self.backbone(torch.cat([src_img, trg_img]))).halves()

    def features(self, pair: Pair) -> tuple[Features, Features]:
        """Prepared features of a batch of any dataset; no cache, as image numbers are a dataset's own."""
        return self.features_of(pair.src_img, pair.trg_img)

    def training_features(self, pair: Pair) -> tuple[Features, Features]:
        """Prepared features of a training batch; those of a frozen backbone are computed once per image."""
        cache = self._training_features
        # An interrupted training leaves its cache here. Outside of training the weights may have changed since.
        if cache is None or not self.trainer.training or not (numbers := pair.image_numbers()):
            return self.features(pair)
        images = self.backbone.normalise(torch.cat([pair.src_img, pair.trg_img]))
        return self.prepare(cache(images, numbers, self.backbone)).halves()

    def match_images(
        self, src: ImageSource, trg: ImageSource, points: object = None, size: int | Size | None = None
    ) -> inference.ImageMatches:
        """Match two image files: see `inference.match_images`."""
        return inference.match_images(self, src, trg, points, size)

    def open_images(self, src: ImageSource, trg: ImageSource, size: int | Size | None = None) -> inference.ImagePair:
        """Features of two image files, for any number of queries: see `inference.open_pair`."""
        return inference.open_pair(self, src, trg, size)

    def backbones(self) -> list[Backbone]:
        """The backbone, and any other that the head has."""
        return [module for module in self.modules() if isinstance(module, Backbone)]

    def count_parameters(self) -> tuple[int, int]:
        """Number of parameters of the head, and of its backbones."""
        inside = sum(p.numel() for backbone in self.backbones() for p in backbone.parameters())
        return sum(p.numel() for p in self.parameters()) - inside, inside

    def load_weights(self) -> "Matcher":
        """Load the backbones' pretrained weights, once."""
        for backbone in self.backbones():
            backbone.load()
        return self

    # ------------------------------------------------------------------ training

    def training_losses(self, pair: Pair) -> Tensor | dict[str, Tensor]:
        """Loss of a training batch, as `loss` returns it. A head that trains in stages overrides this."""
        return self.loss(self.match(*self.training_features(pair)), pair)

    def training_step(self, pair: Pair, batch_idx: int) -> Tensor:
        found = self.training_losses(pair)
        terms = found if isinstance(found, dict) else {"loss": found}
        values = torch.stack([term.detach() for term in terms.values()])
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if processes() > 1 and every and (self.global_step + 1) % every == 0:
            values = over_processes(values) / processes()  # a collective call, so in logged steps alone
        logged = {f"train/{name}": value for name, value in zip(terms, values, strict=True)}
        self.log_dict(logged, batch_size=len(pair.index))  # not prog_bar: the bar would wait for the GPU in every step
        return terms["loss"]

    def setup(self, stage: str) -> None:
        if self.trainer.precision in ("bf16-true", "16-true"):  # it rounds the keypoints, too: 375 px become 376
            mixed = self.trainer.precision.replace("true", "mixed")
            raise ZooError(f"--trainer.precision {self.trainer.precision} rounds coordinates, too: give {mixed}")

    def configure_callbacks(self) -> list[Callback]:
        """The zoo's callbacks, less those that the trainer was given."""
        given: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in default_callbacks() if not any(isinstance(other, type(c)) for other in given)]

    def on_fit_start(self) -> None:
        self.evaluation = None
        if self.trained and not self.trainer.ckpt_path:  # weights of an earlier training, which does not go on
            self.before = self.trained.get("dataset") or "unknown data"
        if not self.training:  # `load` and matching set eval mode, which Lightning would keep
            self.train()
        # Frozen parts of a backbone and its BatchNorm stay in eval mode: not the oversight that Lightning warns of.
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
        self.load_weights()  # after a checkpoint is restored, so that only missing weights are fetched

    def on_train_start(self) -> None:
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        on_disk = bool(getattr(dataset, "images", None))
        megabytes = self.hparams.feature_cache_mb if on_disk and self.backbone.finetune == "none" else 0
        self._training_features = FeatureCache(megabytes * 2**20) if megabytes else None

    def on_fit_end(self) -> None:
        self._training_features = None
        self._set_trained(describe_training(self.trainer) or self.trained)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if not (groups := self.param_groups()):
            raise ZooError("nothing to train: every parameter is frozen; set --model.finetune to `all` or a number")
        h = self.hparams
        optimizer = create_optimizer(h.optimizer, groups, h.weight_decay, bool(self.trainer.gradient_clip_val))
        schedule = create_schedule(h, optimizer, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": schedule} if schedule else optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["head"], checkpoint["module"] = self.head_name, type(self).__module__
        checkpoint["trained"] = self.trained
        try:
            trainer = self.trainer
        except RuntimeError:  # it has none
            return
        checkpoint["trained"] = describe_training(trainer) or self.trained
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FiniteLoss):  # Lightning does not ask callbacks about a file of weights alone
                callback.check()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._set_trained(checkpoint.get("trained"))
        self.before = (self.trained or {}).get("before")

    def _set_trained(self, trained: dict[str, Any] | None) -> None:
        self.trained = trained
        self.image_size = (trained or {}).get("size") or self.image_size

    # ------------------------------------------------------------------ evaluation

    def _start_evaluation(self, loaders: Any) -> None:
        h = self.load_weights().hparams
        self.evaluation = Evaluation(self, loaders, h.protocol, h.alphas, h.feature_cache_mb)

    def on_validation_start(self) -> None:
        self._start_evaluation(self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        self._start_evaluation(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        self._start_evaluation(self.trainer.predict_dataloaders)
        self.evaluation.check_keypoints()  # before predicting: an error later would lose the other datasets' points

    def validation_step(self, pair: Pair, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluation.score(pair, dataloader_idx)

    test_step = validation_step

    def predict_step(self, pair: Pair, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        points = self.evaluation.predict(pair, dataloader_idx)
        return {"index": pair.index, "points": points, "kps_mask": pair.kps_mask}

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        self.scores = self.evaluation.scores(stage)
        self.evaluation.release()
        self.log_dict(self.scores)  # already reduced over processes

    def on_predict_epoch_end(self) -> None:
        self.evaluation.release()


HEADS: Registry[type[Matcher]] = Registry("head")


def _grid_of(cells: int, features: Features) -> Size:
    """(h, w) of a correlation with so many cells: the features' grid, or one with finer or coarser cells."""
    h, w = size_of(features.maps[0])
    ratio = (cells / (h * w)) ** 0.5
    return round(h * ratio), round(w * ratio)
