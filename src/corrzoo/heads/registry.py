"""The registry of matching heads."""

from corrzoo.matcher import Matcher
from corrzoo.registry import Registry

HEADS: Registry[type[Matcher]] = Registry("head", "list_heads()")
register_head = HEADS.register
