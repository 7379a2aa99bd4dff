"""The zoo's one error and the commands' parser, in a file that needs no torch: what computes nothing starts at once."""

import argparse
from typing import Any, NoReturn


class ZooError(ValueError):
    """Something a user can mend: the message names the value, what was expected, and the remedy, in one line."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ZooError(f"{message}; --help lists the options")
