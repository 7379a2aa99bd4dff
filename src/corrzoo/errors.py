"""ZooError, messages in one line, and the parser of all commands that are not LightningCLI's."""

import argparse
from typing import Any, NoReturn


class ZooError(ValueError):
    """Error that a user can fix. Its message is one line: the value, what was expected, and the remedy."""


def check_above_zero(**options: float | None) -> None:
    """Raise ZooError if an option is 0 or less; None is allowed."""
    for name, value in options.items():
        if value is not None and value <= 0:
            raise ZooError(f"{name} {value}: expected a number above 0")


def one_line(message: object) -> str:
    """The text of a message or an exception in one line."""
    return " ".join(str(message).split())


class Parser(argparse.ArgumentParser):
    """Parser without abbreviated options, whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        # argparse reads a value such as -5,80 as an option
        hint = ", written as --option=value if it begins with '-'" if message.endswith("expected one argument") else ""
        raise ZooError(f"{message}{hint}; --help lists the options")
