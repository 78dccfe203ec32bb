"""What the command line answers with one line and exit code 2."""

from __future__ import annotations

__all__ = ["TpcheckError"]


class TpcheckError(Exception):
    """Bad input. The message says what was found, where, and what to do about it."""
