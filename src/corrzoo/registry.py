"""Registries: names of heads, backbones, datasets, augmentations and protocols, and errors that suggest the nearest."""

import difflib
import importlib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from corrzoo.errors import ZooError, one_line

T = TypeVar("T")


def nearest(name: str, options: Iterable[str]) -> str:
    """': did you mean ...?' with the closest of `options`, or an empty string if none is close."""
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return f": did you mean {by_lower[close[0]]!r}?" if close else ""


def suggestion(name: str, options: Iterable[str]) -> str:
    """': did you mean ...?' with the closest of `options`, or ': choose one of ...' with all of them."""
    options = sorted(options)
    return nearest(name, options) or f": choose one of {', '.join(options)}"


class Registry(Generic[T]):
    """Registered things by name. `kind` is what errors call one of them, such as "backbone"."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, thing: T) -> T:
        """Class decorator: register a class under its `name`, or under its class name if it has none."""
        return self.add(getattr(thing, "name", None) or thing.__name__, thing)  # type: ignore[attr-defined]

    def add(self, name: str, thing: T) -> T:
        """Register `thing` under `name`, or raise ZooError if the name is taken."""
        if name in self._things:
            raise ZooError(f"{self.kind} {name!r} is already registered: choose another name")
        self._things[name] = thing
        return thing

    def name_of(self, thing: T) -> str:
        """Name that `thing` is registered under; the class name of a class that is not registered."""
        names = (name for name, registered in self._things.items() if registered is thing)
        return next(names, thing.__name__)  # type: ignore[attr-defined]

    def create(self, name: str, *args: Any, **options: Any) -> Any:
        """An instance of a registered class. Options must fit the annotations of its `__init__`; `args` are as given.

        Raises:
            ZooError: if the name or an option is unknown, or a value has the wrong type.
        """
        thing: Any = self[name]
        return thing(*args, **_checked(f"{self.kind} {name!r}", thing, options))

    def options(self, name: str) -> list[str]:
        """Names of all options of a registered class, base classes included."""
        return list(_parser(self[name]).get_defaults().keys())

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            raise ZooError(f"unknown {self.kind} {name!r}{suggestion(name, self._things)}")
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._things)


def import_plugins(names: str | list[str]) -> list[str]:
    """Import modules that register heads, backbones or datasets, and return their names as a list.

    Args:
        names: Module names: a list, or a string with commas between them.

    Raises:
        ZooError: if a module, or a module that it imports, is not found.
    """
    listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    for name in listed:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise ZooError(f"plugin {name!r} needs the module {error.name!r}, which is not installed") from error
            where = "in the working folder, on PYTHONPATH, or installed"
            raise ZooError(f"there is no plugin {name!r}: expected the name of a module {where}") from error
    return listed


def _parser(cls: Any) -> Any:
    """A parser with an option for each parameter of a class and of its bases.

    Positional parameters without a default are left out: `create` takes them as `args`.
    """
    from jsonargparse import ArgumentParser  # here, as `import corrzoo.ops` needs torch alone

    parameters = inspect.signature(cls).parameters.values()
    given = {p.name for p in parameters if p.default is p.empty and p.kind is not p.KEYWORD_ONLY}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=given, fail_untyped=False)
    return parser


def _checked(what: str, cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options with their values as jsonargparse reads them."""
    parser = _parser(cls)
    known = list(parser.get_defaults().keys())
    for name in options.keys() - known:
        raise ZooError(f"{what} has no option {name!r}{suggestion(name, known)}")
    functions = {name: value for name, value in options.items() if callable(value)}  # not values of a command line
    plain = {name: value for name, value in options.items() if name not in functions}
    try:
        return functions | parser.parse_object(plain, defaults=False).as_dict()
    except ArgumentError as error:
        message = one_line(error)
        value = message.rsplit(": ", 1)[-1]
        choices = re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[(.*?)\]", message)))
        hint = nearest(value, choices) or (f": expected one of {', '.join(dict.fromkeys(choices))}" if choices else "")
        raise ZooError(f"{what}: {message}{hint}") from error
