"""Names to things: one decorator, one dict, and errors that say what was meant."""

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from corrzoo.types import ZooError

T = TypeVar("T")


def nearest(name: str, options: Iterable[str]) -> str:
    """': did you mean ...?' with the closest of `options`, or an empty string when none is close."""
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return f": did you mean {by_lower[close[0]]!r}?" if close else ""


class Registry(Generic[T]):
    """A dict of registered things of one kind.

    Args:
        kind: What the things are called in errors, such as "backbone".
        listing: The public function that lists them, such as "list_backbones()".
    """

    def __init__(self, kind: str, listing: str) -> None:
        self.kind, self.listing = kind, listing
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make the decorated thing known as `name`.

        Raises:
            ZooError: when the name is taken.
        """

        def add(thing: T) -> T:
            if name in self._things:
                raise ZooError(f"{self.kind} {name!r} is registered already, choose another name")
            self._things[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            hint = nearest(name, self._things) or f": choose one of {', '.join(sorted(self._things))}"
            raise ZooError(f"unknown {self.kind} {name!r}{hint} see {self.listing}")
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._things)


def import_plugins(names: str | list[str]) -> list[str]:
    """Import modules that register heads, backbones or datasets of their own.

    Args:
        names: One module, or several: with commas between them, or a list.

    Returns:
        The names, one by one.

    Raises:
        ZooError: when a module, or another that it imports, is not found.
    """
    listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in listed:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise ZooError(f"plugin {name!r} needs the module {error.name!r}, which is not installed") from error
            where = "in the working folder, on PYTHONPATH, or installed"
            raise ZooError(f"there is no plugin {name!r}: expected the name of a module {where}") from error
    return listed
