"""A benchmark of `tpcheck compare`: silent bugs put into real megatron-core runs, and clean runs beside them.

    python -m tests.silent_bugs [NAME …]      `make silent-bugs` runs all and writes results/silent_bugs/

A bug changes numbers and nothing else: no exception, no NaN, no shape. Each is a context manager around the launch of
a run, whose ranks are forked inside it, and leaves nothing behind (`case.py`). What is known of bugs like it in public
stands with it as `source`.
"""

from patches import cpu

cpu.enable()  # what it replaces in megatron-core has to be there before bugs replace it

from tests.silent_bugs import backward, experts, forward, gradients, groups, losses, resumes, settings, small, updates  # noqa: E402, F401
from tests.silent_bugs.case import BUGS, Bug, Clean  # noqa: E402
from tests.silent_bugs.clean import CLEAN  # noqa: E402

__all__ = ["BUGS", "CASES", "CLEAN", "Bug", "Clean"]

CASES: dict[str, Clean] = {**BUGS, **CLEAN}
