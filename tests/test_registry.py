from typing import Any, Literal

import pytest

from corrzoo.registry import Registry, import_plugins, nearest
from corrzoo.types import ZooError


def test_register_get_and_list():
    things = Registry("thing")
    things.add("one", 1)
    assert things["one"] == 1 and things.names() == ["one"] and "one" in things and "two" not in things


def test_a_duplicate_name_raises():
    things = Registry("thing")
    things.add("one", 1)
    with pytest.raises(ZooError, match="thing 'one' is already registered"):
        things.add("one", 2)


def test_an_unknown_name_suggests_the_nearest():
    things = Registry("thing")
    things.add("dinov2_b14", 1)
    with pytest.raises(ZooError, match=r"unknown thing 'dinov2_b': did you mean 'dinov2_b14'\?$"):
        things["dinov2_b"]
    with pytest.raises(ZooError, match="choose one of dinov2_b14"):
        things["zzz"]


def test_a_thing_has_the_name_that_it_is_registered_under():
    class Named:
        name = "my_thing"

    things = Registry("thing")
    things.register(Named)
    inherits = type("Inherits", (Named,), {})
    assert [things.name_of(thing) for thing in (Named, inherits)] == ["my_thing", "Inherits"]


def test_nearest_ignores_case():
    assert nearest("lpmflow", ["LPMFlow", "Baseline"]) == ": did you mean 'LPMFlow'?"
    assert nearest("qqqqqq", ["LPMFlow"]) == ""


def test_plugins_with_a_comma_too_many():
    assert import_plugins("json, csv,") == ["json", "csv"] and import_plugins("") == []


class Base:
    def __init__(self, lr: float = 1.0, mode: Literal["a", "b-c"] = "a") -> None:
        self.lr, self.mode = lr, mode


class Thing(Base):
    def __init__(self, where: str, depth: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.where, self.depth = where, depth


def test_create_passes_options_of_the_class_and_of_its_bases():
    things = Registry("thing")
    assert things.register(Thing) is Thing and things.options("Thing") == ["depth", "lr", "mode"]
    made = things.create("Thing", "here", depth=4, mode="b-c")
    assert (made.where, made.depth, made.mode, made.lr) == ("here", 4, "b-c", 1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dept": 4}, r"thing 'Thing' has no option 'dept': did you mean 'depth'\?"),
        ({"zzz": 4}, r"thing 'Thing' has no option 'zzz': choose one of depth, lr, mode"),
        ({"depth": "six"}, r"thing 'Thing': .*depth.* Expected a <class 'int'>. Got value: six"),
        ({"mode": "c"}, r"thing 'Thing': .*mode.* Got value: c"),
        ({"mode": "b_c"}, r"thing 'Thing': .*: did you mean 'b-c'"),
    ],
)
def test_create_refuses_unknown_options_and_wrong_values(options, message):
    things = Registry("thing")
    things.register(Thing)
    with pytest.raises(ZooError, match=message) as error:
        things.create("Thing", "here", **options)
    assert "\n" not in str(error.value)


def test_an_option_may_be_required():
    class Needing(Base):
        def __init__(self, where: str, *, kinds: dict[str, list[str]], **options: Any) -> None:
            super().__init__(**options)
            self.kinds = kinds

    things = Registry("thing")
    things.add("needing", Needing)
    assert things.create("needing", "here", kinds={"trn": ["car"]}, lr=2.0).kinds == {"trn": ["car"]}
    with pytest.raises(ZooError, match="thing 'needing': the following arguments are required: kinds"):
        things.create("needing", "here")
