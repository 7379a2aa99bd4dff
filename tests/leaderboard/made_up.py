"""Result files that tests make up."""


def result(pck=50.0, seed=0, **changes):
    """What `lightning test` of corrzoo 0.1.0 writes, shortened: `pck` at 0.1, half of it at 0.05."""
    row = {"pairs": 5, "points": 40} | {f"pck@{a:g}/{w}": pck * a * 10 for a in (0.05, 0.1) for w in ("image", "point")}
    return {
        **{"label": "", "head": "Baseline", "options": {"stride": 8, "backbone_size": None}, "backbone": "dinov2_b14"},
        **{"weights": "pretrained", "dataset": "spair71k", "split": "test", "dataset_options": {}, "pairs": 10},
        **{"resolution": 224, "protocol": "default:bbox", "flaw": "", "alphas": [0.05, 0.1], "average": "image"},
        **{"params_backbone": 86_600_000, "params_head": 1, "seed": seed, "checkpoint": "best.ckpt", "device": "cpu"},
        **{"precision": "32-true", "versions": {"corrzoo": "0.1.0"}, "ms_per_pair": 10.0 + seed, "peak_memory_mb": 900},
        "trained": {"dataset": "spair71k", "batch_size": 16, "max_epochs": 10, "steps": 100 + seed, "seed": seed},
        "pck": {"pck@0.05": pck / 2, "pck@0.1": pck, "pck@0.1/image": pck},
        "breakdown": {"category": {"bus": row, "cat": row}, "scale": {"0": row, "2": row, ">0": row}, "viewpoint": {}},
    } | changes
