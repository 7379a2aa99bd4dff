"""Samples: images and keypoints held together, batches, epochs, workers, and errors of create_dataset."""

import pickle
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import SPAIR_KPS, draw, write_pfwillow, write_spair
from torch.utils.data import DataLoader

from corrzoo.data import PairDataset, create_dataset, list_datasets
from corrzoo.data.pairs import mirror, z_order
from corrzoo.types import Pair, ZooError


def centres(image: torch.Tensor, near: torch.Tensor) -> list[list[float]]:
    """Centre of mass of what is red in a (3, H, W) image, within half the keypoints' distance of each of `near`."""
    _, H, W = image.shape
    red = (image[0].double() - image[1].double()).clamp(min=0)
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    owner = torch.cdist(torch.stack([x, y], -1).view(-1, 2), near.float()).argmin(1).view(H, W)
    found = []
    for k in range(len(near)):
        mass = red * (owner == k)
        found.append([float((mass * x).sum() / mass.sum()), float((mass * y).sum() / mass.sum())])
    return found


@pytest.mark.parametrize("size", [64, 97, (40, 120)])
def test_keypoints_lie_on_their_squares(tmp_path: Path, size: int | tuple[int, int]) -> None:
    write_spair(tmp_path)
    dataset = create_dataset("spair71k", tmp_path, "trn", size=size)
    H, W = (size, size) if isinstance(size, int) else size
    for i in range(2):
        sample, record = dataset[i], dataset.record(i)
        for side in ("src", "trg"):
            image, kps = getattr(sample, f"{side}_img"), getattr(sample, f"{side}_kps")
            assert image.shape == (3, H, W) and image.dtype == torch.uint8
            assert np.allclose(centres(image, kps), kps, atol=0.35)  # JPEG's colour is coarse
            w, h = getattr(record, f"{side}_size")
            expected = [[x * W / w, y * H / h] for x, y in getattr(record, f"{side}_kps").tolist()]
            assert np.allclose(kps, expected, atol=1e-4)
            assert getattr(sample, f"{side}_size").tolist() == [w, h]
        assert sample.kps_mask.dtype == torch.bool and sample.kps_mask.all()


def test_collate_pads_to_the_longest(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset = create_dataset("spair71k", tmp_path, "trn", size=32)
    samples = [dataset[i] for i in range(4)]
    batch = PairDataset.collate(samples)
    assert batch.kps_mask.sum(1).tolist() == [3, 3, 2, 1] and batch.src_kps.shape == (4, 3, 2)
    for i, sample in enumerate(samples):
        n = len(sample.src_kps)
        assert torch.equal(batch.src_kps[i, :n], sample.src_kps) and torch.equal(batch.trg_kps[i, :n], sample.trg_kps)
        assert (batch.src_kps[i, n:] == 0).all() and not batch.kps_mask[i, n:].any()
        for name in (
            "src_img",
            "trg_img",
            "src_size",
            "trg_box",
            "index",
            "category",
            "difficulty",
            "src_id",
            "trg_id",
        ):
            assert torch.equal(getattr(batch, name)[i], getattr(sample, name))
    assert [value.dtype for value in batch] == [value.dtype for value in samples[0]]


def jitter(sample: Pair, rng: torch.Generator) -> Pair:
    sample.src_img.zero_()  # an augmentation may write into its sample
    return sample._replace(src_kps=sample.src_kps + torch.rand((), generator=rng))


def test_augmentation_depends_on_seed_epoch_and_pair_only(tmp_path: Path) -> None:
    write_spair(tmp_path)
    plain = create_dataset("spair71k", tmp_path, "trn", size=32)

    def shifts(seed: int, epoch: int, workers: int = 0) -> list[float]:
        dataset = create_dataset("spair71k", tmp_path, "trn", size=32, augment=jitter, seed=seed)
        loader = DataLoader(dataset, None, num_workers=workers, persistent_workers=workers > 0)
        if workers:
            list(loader)  # the workers are running when the epoch changes
        dataset.set_epoch(epoch)
        samples = list(loader)
        assert all(sample.src_id == sample.trg_id == -1 for sample in samples)
        return [float((sample.src_kps - plain[i].src_kps).mean()) for i, sample in enumerate(samples)]

    first = shifts(0, 0)
    assert len({round(shift, 4) for shift in first}) == 4
    assert shifts(0, 0) == first
    for other in (shifts(1, 0), shifts(0, 1)):
        assert all(abs(a - b) > 1e-4 for a, b in zip(first, other, strict=True))
    assert shifts(0, 1, workers=2) == shifts(0, 1)
    augmented = create_dataset("spair71k", tmp_path, "trn", size=32, augment=jitter)
    assert torch.equal(augmented[0].trg_img, plain[0].trg_img) and torch.equal(augmented[1].trg_img, plain[1].trg_img)


def test_a_pickled_dataset_has_no_pixels(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset = create_dataset("spair71k", tmp_path, "trn", size=256)
    sample = dataset[0]
    data = pickle.dumps(dataset)
    assert len(data) < sample.src_img.nbytes
    assert torch.equal(pickle.loads(data)[0].src_img, sample.src_img)


def test_iteration_ends(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset = create_dataset("spair71k", tmp_path, "trn", size=32)
    assert [int(sample.index) for sample in dataset] == [0, 1, 2, 3]
    for i in (4, -1):
        with pytest.raises(IndexError):
            dataset[i]


def test_image_of_another_size_is_an_error(tmp_path: Path) -> None:
    write_spair(tmp_path)
    name = next(iter(SPAIR_KPS))
    draw(tmp_path / "SPair-71k" / "JPEGImages" / name, (32, 24))
    dataset = create_dataset("spair71k", tmp_path, "trn")
    with pytest.raises(ZooError, match=r"2008_000001\.jpg is 32x24, but annotated as 64x48"):
        dataset[0]


@pytest.mark.parametrize(
    "call, message",
    [
        (("spair", "trn", {}), "unknown dataset 'spair': did you mean 'spair71k'"),
        (("spair71k", "tset", {}), "spair71k has no split 'tset': choose from trn, val, test"),
        (("spair71k", "trn", {"size": 0}), "image size 0"),
        (("spair71k", "trn", {"layuot": "small"}), "dataset 'spair71k' has no option 'layuot': did you mean 'layout'"),
        (("spair71k", "trn", {"refesh": True}), "no option 'refesh': did you mean 'refresh'"),
        (("spair71k", "trn", {"refresh": "perhaps"}), "dataset 'spair71k': .*refresh.*perhaps"),
    ],
)
def test_typos_get_one_line(tmp_path: Path, call: tuple, message: str) -> None:
    write_spair(tmp_path)
    name, split, options = call
    with pytest.raises(ZooError, match=message) as error:
        create_dataset(name, tmp_path, split, **options)
    assert "\n" not in str(error.value)


def test_train_is_trn_and_the_list_is_complete(tmp_path: Path) -> None:
    write_spair(tmp_path)
    assert create_dataset("spair71k", tmp_path, "train").split == "trn"
    assert {"spair71k", "pfpascal", "pfwillow", "caltech101", "cub"} <= set(list_datasets())


def test_the_fingerprint_is_that_of_pairs_and_image_sizes(tmp_path: Path) -> None:
    write_pfwillow(tmp_path / "list", mats=False)
    write_pfwillow(tmp_path / "folders", lists=False)
    listed = create_dataset("pfwillow", tmp_path / "list", "test")
    assert listed.title == "pfwillow"
    assert create_dataset("pfwillow", tmp_path / "folders", "test", size=32).fingerprint() == listed.fingerprint()
    draw(tmp_path / "folders" / "PF-WILLOW" / "duck(S)" / "b_002.png", (91, 92))
    assert create_dataset("pfwillow", tmp_path / "folders", "test").fingerprint() != listed.fingerprint()
    drawn = [create_dataset("synthetic", "", "test", length=4, seed=seed).fingerprint() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def passes(pairs: np.ndarray, memory: int) -> int:
    """How many images are computed if the `memory` images used last are kept."""
    kept, count = [], 0
    for image in pairs.ravel().tolist():
        count += image not in kept
        kept = [*(other for other in kept if other != image), image][-memory:]
    return count


def test_in_the_order_of_pairs_a_small_cache_suffices() -> None:
    """All 27 * 26 pairs of 27 images, about a category of SPair-71k's test split."""
    pairs = np.array(list(permutations(range(27), 2)))
    ordered = pairs[z_order(*pairs.T).argsort()]
    assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, pairs.tolist()))
    for memory, most in ((27, 27), (16, 140), (8, 280)):
        assert passes(ordered, memory) <= most
    assert passes(pairs, 16) == 700 and passes(np.random.default_rng(0).permutation(pairs), 16) > 500


def test_pairs_are_ordered_by_category_and_each_is_there_once(tmp_path: Path) -> None:
    write_spair(tmp_path)
    dataset = create_dataset("spair71k", tmp_path, "trn")
    order = dataset.order()
    assert sorted(order) == [0, 1, 2, 3] and [dataset.record(i).category for i in order] == ["aeroplane"] * 3 + ["cat"]
    assert create_dataset("synthetic", tmp_path, "val", length=3).order() == [0, 1, 2]


def test_a_mirrored_batch_is_the_batch_of_mirrored_samples():
    dataset = create_dataset("synthetic", "", "test", 64)
    samples = [dataset[i] for i in range(3)]
    samples[1] = samples[1]._replace(src_box=torch.full((4,), torch.nan))  # not annotated
    whole, parts = mirror(PairDataset.collate(samples)), PairDataset.collate([mirror(sample) for sample in samples])
    for name, found, expected in zip(Pair._fields, whole, parts, strict=True):
        if name in ("src_kps", "trg_kps"):  # the others are padding
            found, expected = found[whole.kps_mask], expected[whole.kps_mask]
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=name)
