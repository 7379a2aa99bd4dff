import pytest

from corrzoo.registry import Registry, nearest
from corrzoo.types import ZooError


def test_register_get_and_list():
    things = Registry("thing", "list_things()")
    things.register("one")(1)
    assert things["one"] == 1 and things.names() == ["one"] and "one" in things and "two" not in things


def test_a_taken_name_raises():
    things = Registry("thing", "list_things()")
    things.register("one")(1)
    with pytest.raises(ZooError, match="thing 'one' is registered already"):
        things.register("one")(2)


def test_an_unknown_name_says_what_was_meant():
    things = Registry("thing", "list_things()")
    things.register("dinov2_b14")(1)
    with pytest.raises(ZooError, match=r"unknown thing 'dinov2_b': did you mean 'dinov2_b14'\? see list_things\(\)"):
        things["dinov2_b"]
    with pytest.raises(ZooError, match="choose one of dinov2_b14"):
        things["zzz"]


def test_nearest_does_not_mind_case():
    assert nearest("lpmflow", ["LPMFlow", "Baseline"]) == ": did you mean 'LPMFlow'?"
    assert nearest("qqqqqq", ["LPMFlow"]) == ""
