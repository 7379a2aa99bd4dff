"""Tables of parts that a mirror swaps, and of parts that look alike."""

import json

import pytest

from corrzoo.data import DATASETS
from corrzoo.data.readers import spair, symmetry

TABLES = [*((c, symmetry.SPAIR71K[c]) for c in spair.CATEGORIES), ("ap10k", symmetry.AP10K["*"])]


@pytest.mark.parametrize(("name", "pairs"), TABLES, ids=[name for name, _ in TABLES])
def test_a_mirror_swaps_each_part_with_one_other(name, pairs):
    parts = [part for pair in pairs for part in pair]
    assert pairs and len(set(parts)) == len(parts) == 2 * len(pairs)


def test_tables_are_those_of_the_annotations(shared):
    facts = json.loads((shared / "specs" / "symmetry.json").read_text())
    for name in ("spair71k", "ap10k", "cub"):
        table = {category: [tuple(pair) for pair in kinds["mirror"]] for category, kinds in facts[name].items()}
        assert DATASETS[name].mirror_pairs == table
        groups = {category: [tuple(group) for group in kinds["groups"]] for category, kinds in facts[name].items()}
        assert DATASETS[name].groups == groups
    assert DATASETS["spair71k_u"].mirror_pairs == {} == DATASETS["spair71k_u"].groups


@pytest.mark.parametrize("name", ["spair71k", "ap10k", "cub"])
def test_a_part_is_in_one_group_at_most(name):
    for groups in DATASETS[name].groups.values():
        parts = [part for group in groups for part in group]
        assert parts and len(set(parts)) == len(parts) and all(len(group) > 1 for group in groups)
