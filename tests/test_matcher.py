"""Matcher: optimiser groups, feature caches, scoring, weights, and the check of the loss."""

import json
import random

import pytest
import torch
from fixtures import write_caltech, write_synthetic_spair
from lightning.pytorch import Callback, Trainer, seed_everything

import corrzoo
from corrzoo.backbones.cache import FeatureCache
from corrzoo.callbacks import MatchImages, ResultsWriter
from corrzoo.data import PairDataset
from corrzoo.data.module import PairsDataModule
from corrzoo.data.pairs import FolderDataset
from corrzoo.heads.baseline import Baseline
from corrzoo.matcher import Matcher
from corrzoo.scoring.evaluation import predict_points
from corrzoo.types import Match, ZooError

TINY = dict(backbone="timm/test_vit.r160_in1k", weights="random")


class Straight(Matcher):
    """The smallest head: zero flow."""

    def match(self, src, trg):
        return Match(src.maps[0].sum() * torch.zeros(len(src.image), 2, 4, 4))


def data(workers=0, **lengths):
    options = {"synthetic": {"length": {"trn": 8, "val": 6, "test": 6} | lengths}}
    return PairsDataModule(
        train="synthetic", test=["synthetic"], image_size=64, batch_size=4, num_workers=workers, options=options
    )


def trainer(tmp_path, **options):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False, accelerator="cpu", devices=1)
    return Trainer(default_root_dir=tmp_path, **{"max_epochs": 1} | quiet | options)


def test_parameter_groups_have_learning_rates_and_cover_every_parameter_once():
    model = corrzoo.create_matcher("Baseline", **TINY, lr=1e-2, backbone_lr=1e-3, finetune=2)
    groups = {g["name"]: g for g in model.param_groups()}
    assert groups["head"]["lr"] == 1e-2 and groups["backbone"]["lr"] == 1e-3
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_fully_frozen_model_is_an_error(tmp_path):
    model = corrzoo.create_matcher("Baseline", **TINY, finetune="none", learn_temperature=False)
    with pytest.raises(ZooError, match="nothing to train"):
        trainer(tmp_path).fit(model, data())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_round_annotations_are_refused(tmp_path, precision):
    model = corrzoo.create_matcher("Baseline", **TINY)
    with pytest.raises(ZooError, match=f"{precision} rounds coordinates, too: give {precision[:-4]}mixed"):
        trainer(tmp_path, precision=precision).test(model, data())


def test_the_feature_cache_does_not_change_scores_and_is_released(tmp_path):
    scores = []
    for megabytes in (0, 1024):
        torch.manual_seed(0)
        model = corrzoo.create_matcher("Baseline", **TINY, feature_cache_mb=megabytes)
        trainer(tmp_path).test(model, data(), verbose=False)
        assert model.evaluation.cache.used == 0
        scores.append(model.scores)
    assert scores[0] == scores[1] and scores[0]


@pytest.mark.parametrize("backbone, levels", [("timm/test_vit.r160_in1k", [-1]), ("efficientnet_lite0", [1, 3])])
def test_cached_features_give_bit_identical_matches(tmp_path, backbone, levels):
    found = []
    for megabytes in (0, 1, 1024):  # none, some and all are kept
        torch.manual_seed(0)
        model = corrzoo.create_matcher("Baseline", backbone, "random", levels=levels, feature_cache_mb=megabytes)
        pairs = drawn(tmp_path)
        pairs.hparams.batch_size = 1  # of its images, one is mostly known
        batches = trainer(tmp_path, callbacks=[MatchImages(kinds=[])]).predict(model, pairs)
        found.append(torch.cat([batch["points"][batch["kps_mask"]] for batch in batches]))
    assert len(found[0]) > 100 and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Watched:
    """A matcher whose backbone counts its input images."""

    def __init__(self, head=Baseline, **options):
        torch.manual_seed(0)
        self.model, self.images = head(**TINY, **options), 0
        self.model.backbone.register_forward_hook(self._count)

    def _count(self, module, args, output):
        self.images += len(args[0])


def drawn(root, pairs=24, **options):
    """Train on 16 synthetic images of four categories, each in many pairs, and validate on as many."""
    if not (root / "SPair-71k").exists():
        write_synthetic_spair(root, pairs_per_split=pairs, images_per_category=4, size=64)
    return PairsDataModule(root=str(root), image_size=64, batch_size=4, num_workers=0, **options)


class Projected(Baseline):
    """A head whose `prepare` is trained."""

    def __init__(self, **options):
        super().__init__(**options)
        self.project = torch.nn.Conv2d(self.backbone.channels[0], 8, 1)

    def prepare(self, features):
        return super().prepare(features._replace(maps=[self.project(features.maps[0])]))


@pytest.mark.parametrize("head", [Baseline, Projected])
def test_training_caches_features_of_a_frozen_backbone(tmp_path, head):
    trained, images = [], []
    for megabytes in (0, 64):
        watched = Watched(head, finetune="none", lr=1e-2, feature_cache_mb=megabytes)
        options = dict(max_epochs=2, limit_val_batches=0, enable_checkpointing=False)
        trainer(tmp_path, **options).fit(watched.model, drawn(tmp_path))
        trained.append(watched.model.state_dict())
        images.append(watched.images)
        assert watched.model._training_features is None
    data = drawn(tmp_path)
    data.setup("fit")
    distinct = len(data.datasets["spair71k", "trn"].images)
    assert images == [2 * 24 * 2, distinct] and distinct < 24
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    assert not torch.equal(trained[0]["temperature"], Watched(head).model.temperature)


class PredictsWhileTraining(Callback):
    """Compare predictions on validation pairs with uncached ones at the end of each validation."""

    compared = 0

    def on_validation_end(self, trainer, pl_module):
        pair = next(iter(trainer.val_dataloaders))
        pl_module.eval()
        alone = pair._replace(src_id=torch.full_like(pair.src_id, -1), trg_id=torch.full_like(pair.trg_id, -1))
        assert torch.equal(predict_points(pl_module, pair), predict_points(pl_module, alone))
        self.compared += 1


def test_validation_does_not_read_features_of_training_images(tmp_path):
    """Image numbers of the validation set are also those of cached training images."""
    watched, callback = Watched(finetune="none", lr=1e-2), PredictsWhileTraining()
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False, callbacks=[callback]).fit(
        watched.model, drawn(tmp_path)
    )
    assert callback.compared == 3  # the check before training, and two epochs


@pytest.mark.parametrize("options", [dict(augment="photometric"), dict(finetune="all")])
def test_features_that_change_are_not_cached_in_training(tmp_path, options):
    watched = Watched(finetune=options.pop("finetune", "none"))
    trainer(tmp_path, limit_val_batches=0, enable_checkpointing=False).fit(watched.model, drawn(tmp_path, **options))
    assert watched.images == 2 * 24


def test_evaluation_with_a_small_cache_keeps_the_benchmarks_order(tmp_path, monkeypatch):
    five = 5 * 8 * 8 * 64 * 4  # bytes of five images' features
    monkeypatch.setattr("corrzoo.scoring.evaluation.FeatureCache", lambda limit: FeatureCache(min(limit, five)))
    drawn(tmp_path, pairs=48)
    listed = tmp_path / "SPair-71k" / "Layout" / "large" / "test.txt"
    listed.write_text("".join(random.Random(0).sample(listed.read_text().splitlines(keepends=True), 48)))
    rows, images = [], []
    for in_order in (True, False):
        if not in_order:
            monkeypatch.setattr(FolderDataset, "order", lambda self: list(range(len(self))))
        watched, data = Watched(), drawn(tmp_path, pairs=48)
        data.hparams.batch_size = 2
        trainer(tmp_path).test(watched.model, data, verbose=False)
        rows.append(watched.model.evaluation.by_name()[0][1].rows())
        images.append(watched.images)
    assert rows[0] == rows[1] and [row["index"] for row in rows[0]] == list(range(48))
    assert images[0] == 16 and images[1] > 48  # of 96


def test_prediction_outside_a_run_does_not_cache(tmp_path):
    model = corrzoo.create_matcher("Baseline", **TINY).eval()
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=64)
    pair = PairDataset.collate([dataset[0]])
    before = predict_points(model, pair)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    assert not torch.equal(predict_points(model, pair), before)


class Interrupts(Callback):
    """Raise in the middle of a run, after some images have been cached."""

    def on_test_batch_end(self, trainer, pl_module, *_):
        assert pl_module.evaluation.cache.used > 0
        raise RuntimeError("interrupted")

    def on_train_batch_end(self, trainer, pl_module, *_):
        assert pl_module._training_features.used > 0
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("command", ["fit", "test"])
def test_after_an_interruption_no_features_of_old_weights_are_used(tmp_path, command):
    torch.manual_seed(0)
    model, pairs = corrzoo.create_matcher("Baseline", **TINY, finetune="none"), drawn(tmp_path)
    run = trainer(tmp_path, callbacks=[Interrupts(), MatchImages(kinds=[])], num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="interrupted"):
        getattr(run, command)(model, pairs)
    pair = next(iter(pairs.train_dataloader() if command == "fit" else pairs.test_dataloader()[0]))
    before = predict_points(model.eval(), pair)
    other = corrzoo.create_matcher("Baseline", **TINY, finetune="none")
    model.load_state_dict(other.state_dict())
    assert torch.equal(predict_points(model, pair), predict_points(other.eval(), pair))
    assert not torch.equal(predict_points(model, pair), before)
    assert torch.equal(model.training_losses(pair), other.training_losses(pair))


def test_a_loss_that_is_not_finite_raises_and_names_the_pairs(tmp_path):
    class Broken(Straight):
        def loss(self, match, pair):
            return match.flow.sum() * float("nan")

    with pytest.raises(ZooError, match=r"the loss is nan at step 0 on the pairs \[\d+, \d+, \d+, \d+\]"):
        trainer(tmp_path, num_sanity_val_steps=0).fit(Broken(**TINY), data())


def test_a_backbone_without_weights_refuses_to_run():
    model = Straight(backbone="efficientnet_lite0")
    with pytest.raises(ZooError, match="not loaded"):
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))


def test_protocols_that_evaluate_the_source_swap_the_pair(tmp_path):
    """The identity readout gets the score of hand-made predictions of source points."""
    model = Straight(**TINY, protocol="cats:bbox")
    module = data()
    trainer(tmp_path).test(model, module, verbose=False)
    dataset = corrzoo.create_dataset("synthetic", "", "test", size=64, length=6)
    expected = []
    for i in range(6):
        record = dataset.record(i)
        scale = torch.tensor(record.src_size, dtype=torch.float64) / torch.tensor(record.trg_size, dtype=torch.float64)
        expected.append(corrzoo.score(record.trg_kps * scale, record, "cats:bbox", (0.1,))[0])
    assert model.scores["test/pck@0.1"] == pytest.approx(100 * torch.stack(expected).mean().item())


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_has_other_training_pairs_for_any_number_of_workers(tmp_path, workers):
    seen = []

    class Watching(Straight):
        def training_step(self, pair, batch_idx):
            order = pair.index.argsort()
            seen.append((self.current_epoch, pair.index[order].tolist(), pair.src_kps[order].sum().item()))
            return super().training_step(pair, batch_idx)

    torch.manual_seed(0)
    run = Trainer(
        default_root_dir=tmp_path, max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", devices=1, limit_val_batches=0,
    )  # fmt: skip
    run.fit(Watching(**TINY), data(workers, trn=4))
    (_, first_pairs, first), (_, second_pairs, second) = seen
    assert first_pairs == second_pairs == [0, 1, 2, 3] and first != second
    dataset = corrzoo.create_dataset("synthetic", "", "trn", size=64, length=4)
    for epoch, total in enumerate((first, second)):
        dataset.set_epoch(epoch)
        assert PairDataset.collate([dataset[i] for i in range(4)]).src_kps.sum().item() == pytest.approx(total)


def test_a_trained_matcher_knows_its_training_data(tmp_path):
    """A model trained in Python uses its training size for user images, and results name its training data."""
    model = corrzoo.create_matcher("Baseline", **TINY)
    assert (model.image_size, model.trained) == (224, None)
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(model, data())
    assert model.image_size == 64 and (model.trained["dataset"], model.trained["steps"]) == ("synthetic", 2)
    again = corrzoo.load(corrzoo.save(model, tmp_path / "saved"))
    for k, (one, loop) in enumerate(((model, run), (model, trainer(tmp_path)), (again, trainer(tmp_path)))):
        loop.callbacks.append(ResultsWriter(str(tmp_path / str(k)), table=False))
        loop.test(one, data(), verbose=False)
        result = json.loads((tmp_path / str(k) / "synthetic.json").read_text())
        assert result["trained"] == model.trained and result["trained"]["size"] == 64


def test_several_processes_train_without_logging(tmp_path, monkeypatch):
    monkeypatch.setattr("corrzoo.matcher.processes", lambda: 2)
    monkeypatch.setattr("corrzoo.matcher.over_processes", lambda _: pytest.fail("summed a loss that is not logged"))
    run = trainer(tmp_path, log_every_n_steps=0, limit_val_batches=0, enable_checkpointing=False)
    run.fit(Straight(**TINY), data())
    assert run.global_step == 2


def test_a_checkpoint_of_weights_alone_knows_its_training(tmp_path):
    model = corrzoo.create_matcher("Baseline", **TINY)
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(model, data())
    run.save_checkpoint(path := tmp_path / "weights.ckpt", weights_only=True)
    evaluated = corrzoo.create_matcher("Baseline", **TINY)
    trainer(tmp_path).validate(evaluated, data(), ckpt_path=path, verbose=False)
    for known in (corrzoo.load(path), evaluated):
        assert known.image_size == 64 and known.trained == model.trained


def test_a_matcher_whose_training_was_interrupted_knows_its_training(tmp_path):
    """As in a notebook, where the model lives on. Another model that the same trainer tests is not trained."""

    class Stops(Straight):
        def training_step(self, pair, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("interrupted")
            return super().training_step(pair, batch_idx)

    run = trainer(tmp_path, limit_val_batches=0)
    with pytest.raises(RuntimeError, match="interrupted"):
        run.fit(model := Stops(**TINY), data())
    assert model.image_size == 64 and model.trained["steps"] == 1
    run.callbacks.append(ResultsWriter(str(tmp_path), table=False))
    for one, steps in ((model, 1), (Straight(**TINY), None)):
        run.test(one, data(), verbose=False)
        result = json.loads((tmp_path / "synthetic.json").read_text())
        assert (result["trained"] or {}).get("steps") == steps


def test_a_model_in_eval_mode_trains_in_training_mode(tmp_path):
    """Matching and `load` set eval mode; frozen parts of the backbone stay in it."""
    model, modes = Baseline(**TINY, finetune="none").eval(), []
    model.head = torch.nn.Dropout()

    class Modes(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            modes.append((pl_module.training, pl_module.head.training, pl_module.backbone.trunk.training))

    trainer(tmp_path, max_steps=1, limit_val_batches=1, callbacks=[Modes()]).fit(model, data())
    assert modes == [(True, True, False)]


def test_a_fit_without_validation_draws_no_pictures(tmp_path):
    model, drawn = corrzoo.create_matcher("Baseline", **TINY), []
    for options in (dict(num_sanity_val_steps=0, max_steps=1), dict(max_epochs=1, limit_train_batches=1)):
        pictures = MatchImages(pairs=1)
        trainer(tmp_path, callbacks=[pictures], enable_checkpointing=False, **options).fit(model, data())
        drawn.append([path.name for path in tmp_path.glob("*.png")])
    assert drawn == [[], ["matches-fit.png"]]


def test_a_dataset_without_keypoints_is_refused_before_predicting(tmp_path, monkeypatch):
    write_caltech(tmp_path)
    pairs = PairsDataModule(root=str(tmp_path), test=["synthetic", "caltech101"], image_size=64, num_workers=0)
    monkeypatch.setattr(Straight, "predict_step", lambda *_: pytest.fail("predicted"))
    with pytest.raises(ZooError, match="caltech101 has no keypoints to predict"):
        trainer(tmp_path).predict(Straight(**TINY), pairs)


class MeanOverPairs(Baseline):
    """A head whose loss gives every pair the same weight."""

    def loss(self, match, pair):
        values, where = self.keypoint_errors(match, pair)
        return ((values * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)).mean()


class LearningRates(Callback):
    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append(optimizer.param_groups[0]["lr"])


def test_accumulated_gradients_equal_a_large_batch(tmp_path):
    """The same pairs in each step, the same learning rates, and the same weights after two epochs of three steps."""
    weights, rates = [], []
    for batch_size, accumulated in ((4, 1), (2, 2), (1, 4)):
        seed_everything(0)
        model = MeanOverPairs(**TINY, lr=1e-2, backbone_lr=1e-3, schedule="cosine")
        before = model.state_dict()["temperature"].clone()
        pairs = data(trn=12)
        pairs.hparams.batch_size = batch_size
        watch = LearningRates()
        run = trainer(
            tmp_path / str(batch_size), max_epochs=2, accumulate_grad_batches=accumulated, precision="64-true",
            limit_val_batches=0, callbacks=[watch], enable_checkpointing=False,
        )  # fmt: skip
        run.fit(model, pairs)
        assert run.global_step == 6 and model.trained["pairs_seen"] == 24
        weights.append(model.state_dict())
        rates.append(watch.found)
    assert rates[0] == rates[1] == rates[2] and len(set(rates[0])) == 6
    assert not torch.equal(weights[0]["temperature"], before)
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-10)


def test_forward_needs_no_trainer():
    model = Straight(**TINY)
    assert model(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64)).flow.shape == (2, 2, 4, 4)
