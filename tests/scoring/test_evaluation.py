"""Predictions for the annotated points of a batch."""

import pytest
import torch

import corrzoo
from corrzoo.scoring.evaluation import predict_points
from corrzoo.scoring.pck import PCK
from corrzoo.types import Pair
from small import build


@pytest.mark.parametrize("head", ["Baseline", "MirrorGuided", "MirrorGuided, no layers", "GeoAware"])
def test_a_pair_without_keypoints_is_scored_in_batches_of_any_size(head: str) -> None:
    dataset, model = corrzoo.create_dataset("synthetic", "", "val", size=64, length=2), build(head).eval()
    per_keypoint = ("src_kps", "trg_kps", "kps_mask", "kps_ids", "mirror_ids", "src_alike", "trg_alike")
    without, annotated = dataset[0], dataset[1]
    without = without._replace(**{name: getattr(without, name)[:0] for name in per_keypoint})

    def rows(*batches: list[Pair]) -> list[dict[str, object]]:
        metric = PCK()
        for pair in map(dataset.collate, batches):
            found = predict_points(model, pair)
            assert found.shape == pair.trg_kps.shape and found.dtype == torch.float64
            metric.update(found, pair)
        return metric.rows()

    one, two = rows([without], [annotated]), rows([without, annotated])
    assert [row["index"] for row in one] == [row["index"] for row in two] == [1]
