import torch

from corrzoo.backbones.cache import FeatureCache
from corrzoo.types import Features


class Counting:
    def __init__(self):
        self.seen = []

    def __call__(self, images):
        assert len(images) == 1  # on a CPU: no image's features depend on its neighbours
        self.seen += images[:, 0, 0, 0].tolist()
        return Features(images, [images[:, :, :2, :2] * 2, images.mean((2, 3), keepdim=True)], images[:, :, 0, 0])


def images(ids):
    return torch.tensor(ids, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_each_image_is_computed_once_and_the_order_is_kept():
    cache, compute = FeatureCache(10**6), Counting()
    for ids in ([3, 1, 3, 2], [2, 5, 1]):
        out = cache(images(ids), torch.tensor(ids), compute)
        expected = [Counting()(images([i])) for i in ids]
        for level, got in enumerate(out.maps):
            torch.testing.assert_close(got, torch.cat([one.maps[level] for one in expected]))
        torch.testing.assert_close(out.cls, torch.cat([one.cls for one in expected]))
    assert compute.seen == [3, 1, 2, 5]


def test_memory_is_bounded_and_the_oldest_are_dropped_first():
    one = (3 * 4 + 3 + 3) * 4  # bytes of an image's features
    cache, compute = FeatureCache(2 * one), Counting()
    for i in (1, 2, 1, 3, 1, 2):
        cache(images([i]), torch.tensor([i]), compute)
    assert compute.seen == [1, 2, 3, 2]  # 3 pushed 2 out, 1 was in use
    assert cache.used <= 2 * one


def test_a_batch_larger_than_the_memory_is_computed():
    cache, compute = FeatureCache(1), Counting()
    out = cache(images([1, 2, 1]), torch.tensor([1, 2, 1]), compute)
    assert out.cls[:, 0].tolist() == [1, 2, 1] and compute.seen == [1, 2]


def test_channels_last_maps_stay_channels_last():
    """As a ViT's maps are, so that resizing them does not copy them."""

    def compute(batch):
        maps = [torch.randn(len(batch), 2, 3, 5).permute(0, 3, 1, 2), torch.randn(len(batch), 5, 2, 3)]
        return Features(batch, maps, None)

    cache = FeatureCache(10**6)
    first, again = (cache(images([1, 2]), torch.tensor([1, 2]), compute).maps for _ in range(2))
    for maps in (first, again):
        assert [level.stride()[1:] for level in maps] == [(1, 15, 5), (6, 3, 1)]
    torch.testing.assert_close(again, first, atol=0, rtol=0)
