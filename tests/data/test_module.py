import pytest

from corrzoo.data.module import PairsDataModule
from corrzoo.types import ZooError

FEW = {"synthetic": {"length": {"trn": 8, "val": 5, "test": 7}}}


def module(**options):
    return PairsDataModule(
        train="synthetic", test=["synthetic"], size=48, batch_size=4, workers=0, options=FEW, **options
    )


def test_batches_of_every_split():
    data = module()
    data.setup("fit")
    data.setup("fit")
    train = list(data.train_dataloader())
    assert [len(p.index) for p in train] == [4, 4] and train[0].src_img.shape == (4, 3, 48, 48)
    assert [len(p.index) for p in data.val_dataloader()] == [4, 1]
    data.setup("test")
    (loader,) = data.test_dataloader()
    assert [i for p in loader for i in p.index.tolist()] == list(range(7))


def test_training_pairs_are_shuffled_and_test_pairs_are_not():
    data = module()
    data.setup("fit")
    seen = [i for p in data.train_dataloader() for i in p.index.tolist()]
    assert sorted(seen) == list(range(8))


def test_a_size_of_two_numbers_is_height_and_width():
    data = PairsDataModule(train="synthetic", size=[48, 64], workers=0, batch_size=2, options=FEW)
    data.setup("validate")
    assert next(iter(data.val_dataloader())).trg_img.shape == (2, 3, 48, 64)


def test_a_misspelt_dataset_is_an_error_at_once():
    with pytest.raises(ZooError, match="did you mean 'pfwillow'"):
        PairsDataModule(test=["pfwilow"])
    with pytest.raises(ZooError, match="did you mean 'synthetic'"):
        PairsDataModule(options={"synthetics": {}})


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(augment="catz"), "did you mean 'cats'"),
        (dict(size=[64]), "one side, or \\[H, W\\]"),
        (dict(size=[64, 64, 3]), "one side, or \\[H, W\\]"),
        (dict(batch_size=0), "at least one pair"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_is_fetched(options, expected):
    with pytest.raises(ZooError, match=expected):
        PairsDataModule(**options)


def test_a_misspelt_option_of_a_dataset_names_the_nearest():
    data = PairsDataModule(train="synthetic", options={"synthetic": {"lenght": 8}})
    with pytest.raises(ZooError, match="did you mean 'length'"):
        data.setup("fit")


def test_fewer_training_pairs_than_a_batch_are_an_error():
    data = PairsDataModule(train="synthetic", batch_size=16, size=48, options=FEW)
    data.setup("fit")
    with pytest.raises(ZooError, match="8 training pairs, fewer than"):
        data.train_dataloader()


def test_no_test_dataset_is_an_error():
    data = PairsDataModule(test=[])
    data.setup("test")
    with pytest.raises(ZooError, match="names no dataset"):
        data.test_dataloader()
