"""The registry of matching heads."""

from collections.abc import Callable

from corrzoo.matcher import Matcher
from corrzoo.registry import Registry
from corrzoo.types import ZooError

HEADS: Registry[type[Matcher]] = Registry("head", "list_heads()")


def register_head(name: str) -> Callable[[type[Matcher]], type[Matcher]]:
    """Decorator: make a head known by the name of its class, which is what checkpoints have of it.

    Raises:
        ZooError: when the name is taken, or not that of the class.
    """

    def add(head: type[Matcher]) -> type[Matcher]:
        if head.__name__ != name:
            raise ZooError(f"head {name!r} is a class named {head.__name__!r}: register it by that name")
        return HEADS.register(name)(head)

    return add
