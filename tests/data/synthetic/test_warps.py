"""Pairs of warps: images, masks, and VOC's layout on disk."""

import numpy as np
import pytest
import torch
from PIL import Image

from corrzoo import create_dataset
from corrzoo.data import PairDataset
from corrzoo.data.augment import crop
from corrzoo.data.pairs import mirror
from corrzoo.data.synthetic.warps import BEND, bend, footprint, random_warp, warp_pair
from corrzoo.geometry import cell_centres
from corrzoo.types import EVERYWHERE, ZooError


def warps(**options):
    return create_dataset("synthetic_warps", "", "trn", **{"size": 64, "length": 6, **options})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def test_a_batch_of_warps_has_masks_and_no_keypoints():
    batch = PairDataset.collate([warps()[i] for i in range(4)])
    assert batch.src_img.shape == batch.trg_img.shape == (4, 3, 64, 64) and batch.src_img.dtype == torch.uint8
    assert batch.src_mask.shape == batch.trg_mask.shape == (4, 64, 64)
    assert batch.src_kps.shape == (4, 0, 2) and batch.kps_mask.shape == (4, 0)
    assert batch.src_box.isnan().all() and (batch.src_id == -1).all()
    for mask in (batch.src_mask, batch.trg_mask):
        assert mask.min() >= 0 and mask.max() <= 1
        assert ((mask > 0.5).float().mean((1, 2)) > 0.01).all() and ((mask > 0.5).float().mean((1, 2)) < 0.9).all()


def test_warps_depend_on_seed_epoch_and_number_only():
    assert same(warps()[2], warps()[2])
    later = warps()
    later.set_epoch(1)
    assert not same(warps()[2], later[2]) and not same(warps()[2], warps(seed=1)[2])
    assert not torch.equal(warps()[2].src_img, warps()[2].trg_img)


def test_no_object_is_also_in_the_pairs_that_are_scored():
    pairs = create_dataset("synthetic", "", "val", size=64)
    train = {warps().read_image(n).tobytes() for n in range(6)}
    assert train.isdisjoint(pairs.read_image(n).tobytes() for n in range(6))


def test_both_masks_show_the_same_part_of_the_image():
    """An image that spells out its own coordinates: colours under the masks name the same places in both views."""
    places = cell_centres((96, 96), (255, 255)).T.unflatten(1, (96, 96))
    image = torch.cat([places, torch.full((1, 96, 96), 128.0)]).to(torch.uint8)
    disc = ((places - 127).norm(dim=0) < 90).float()
    for seed in range(6):
        sample = warps(size=96)[0]._replace(src_img=image)
        pair = warp_pair(sample, disc, generator(seed))
        seen = []
        for view, mask in ((pair.src_img, pair.src_mask), (pair.trg_img, pair.trg_mask)):
            at = view[:2, mask > 0.99].float() / 255 * 16  # coarse places, as colours are jittered
            seen.append(torch.histogramdd(at.T, bins=[4, 4], range=[0.0, 16.0, 0.0, 16.0]).hist > 0)
        assert (seen[0] == seen[1]).float().mean() > 0.7


def test_masks_leave_out_parts_that_the_other_view_does_not_show():
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    sample = warps(size=32)[0]._replace(src_img=image)
    pair = warp_pair(sample, torch.ones(32, 32), generator(3))
    for view, mask in ((pair.src_img, pair.src_mask), (pair.trg_img, pair.trg_mask)):
        black = view.float().mean(0) < 10  # beyond the image
        assert mask[black].max() < 0.5 if black.any() else True
    at = cell_centres((32, 32), (2, 2)).unflatten(0, (32, 32)) - 1
    seen = footprint(at * 0.5)  # a view of the middle
    assert seen[16, 16] == 1 and seen[2, 2] == 0 and 200 < seen.sum() < 500


def test_affine_maps_are_normal_around_the_identity():
    maps = torch.stack([random_warp((8, 8), generator(s)) for s in range(400)])
    at = cell_centres((8, 8), (2, 2)).unflatten(0, (8, 8)) - 1
    assert (maps.mean(0) - at).abs().max() < 0.05
    assert 0.1 < (maps - at)[:, 4, 4].std() < 0.25  # near the middle: 0.15 of the shift, and some bending


def test_the_spline_moves_its_control_points_and_is_smooth_between():
    moves = (torch.rand(9, 2, generator=generator()) * 2 - 1) * BEND
    controls = torch.cartesian_prod(torch.tensor([-1.0, 0, 1]), torch.tensor([-1.0, 0, 1])).flip(1)
    torch.testing.assert_close(bend(controls, moves), moves, atol=1e-5, rtol=0)
    shift = torch.tensor([[0.1, -0.2]]).expand(9, 2)
    points = torch.rand(20, 2, generator=generator(1)) * 2 - 1
    torch.testing.assert_close(bend(points, shift), shift[:1].expand(20, 2), atol=1e-5, rtol=0)
    linear = controls * torch.tensor([0.1, 0.3])  # an affine map bends nothing
    torch.testing.assert_close(bend(points, linear), points * torch.tensor([0.1, 0.3]), atol=1e-5, rtol=0)


def test_masks_are_mirrored_and_cropped_with_their_images():
    sample = warps()[0]
    mask = sample.src_img[0].float() / 255
    twin = sample._replace(
        src_img=(mask * 255).to(torch.uint8).expand(3, -1, -1), src_mask=mask,
        src_kps=torch.tensor([[20.0, 20], [40, 40]]), trg_kps=torch.tensor([[20.0, 20], [40, 40]]),
        kps_mask=torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    for changed in (mirror(twin), crop(twin, generator(), p=1.0)):
        torch.testing.assert_close(changed.src_mask, changed.src_img[0].float() / 255, atol=0.01, rtol=0)
    bare = twin._replace(src_mask=EVERYWHERE)
    assert crop(bare, generator(), p=1.0).src_mask is EVERYWHERE


def test_warps_have_no_evaluation_split():
    with pytest.raises(ZooError, match="no split 'val'"):
        create_dataset("synthetic_warps", "", "val")
    with pytest.raises(ZooError, match="length"):
        warps(length=0)
    with pytest.raises(IndexError):
        warps()[6]


# ---------------------------------------------------------------- VOC 2012


@pytest.fixture
def voc(tmp_path):
    home = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    stems = [f"2008_00000{k}" for k in range(4)]
    for k, stem in enumerate(stems):
        image = np.full((40, 60, 3), 90, np.uint8)
        image[10:30, 20:40] = 240
        Image.fromarray(image).save(home / "JPEGImages" / f"{stem}.jpg")
        classes = np.zeros((40, 60), np.uint8)
        classes[9:31, 19:41], classes[10:30, 20:40] = 255, k + 1
        mask = Image.fromarray(classes, mode="P")
        mask.putpalette([0, 0, 0] * 256)
        mask.save(home / "SegmentationClass" / f"{stem}.png")
    (home / "ImageSets" / "Segmentation" / "trainval.txt").write_text("\n".join(stems) + "\n")
    (tmp_path / "PF-PASCAL").mkdir()
    (tmp_path / "PF-PASCAL" / "test_pairs.csv").write_text(
        "source_image,target_image,class\nPF-PASCAL/JPEGImages/2008_000001.jpg,x/2010_000009.jpg,3\n"
    )
    return tmp_path


def test_voc_images_with_their_masks_without_those_of_pf_pascals_test(voc):
    dataset = create_dataset("voc_warps", voc, "trn", size=48)
    assert [path.stem for path in dataset.images] == ["2008_000000", "2008_000002", "2008_000003"]
    assert [dataset.record(i).category for i in range(3)] == ["aeroplane", "bird", "boat"]
    assert dataset.record(0).src_size == (60, 40)
    for i in range(3):
        sample = dataset[i]
        for view, mask in ((sample.src_img, sample.src_mask), (sample.trg_img, sample.trg_mask)):
            grey = view.float().mean(0)
            assert mask.shape == (48, 48) and (mask > 0.9).any()
            assert grey[mask > 0.95].min() > 130  # nothing but the bright object, not even its outline
    assert len(create_dataset("voc_warps", voc, "trn", exclude="")) == 4


def test_missing_voc_files_are_named(voc):
    with pytest.raises(ZooError, match=r"no .*val.txt: fetch VOC 2012"):
        create_dataset("voc_warps", voc, "trn", images="val")
    with pytest.raises(ZooError, match=r"no .*nowhere.csv: .*exclude: ''"):
        create_dataset("voc_warps", voc, "trn", exclude="nowhere.csv")
    (voc / "VOC2012" / "SegmentationClass" / "2008_000000.png").unlink()
    with pytest.raises(ZooError, match=r"2008_000000\.png"):
        create_dataset("voc_warps", voc, "trn", size=48)[0]
