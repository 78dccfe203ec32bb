"""What the command line answers with one line and exit code 2."""

from __future__ import annotations

import reprlib
import sys

__all__ = ["LETTERS", "TpcheckError", "missing_package", "shortened", "shown"]

LETTERS = 80  # of a value in a message


class TpcheckError(Exception):
    """Bad input. The message says what was found, where, and what to do about it."""


def missing_package(error: Exception) -> str:
    """What to do about `error`, if it says that this Python lacks a whole package; nothing otherwise."""
    if not isinstance(error, ModuleNotFoundError) or not error.name or "." in error.name:
        return ""
    return f"{sys.executable} has no {error.name}: use a Python that tpcheck is installed for"


def shown(value: object) -> str:
    """`value` as Python writes it, shortened: whatever it is, what a user gave never floods a message."""
    return shortened(_SHORT.repr(value))


def shortened(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 3]}..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, LETTERS, LETTERS
