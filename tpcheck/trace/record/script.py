"""The trace of an unmodified Megatron-LM script, from its first training step to the last wanted one.

    with trace_script("out/tp2", steps=[0, 1]):
        runpy.run_path("pretrain_gpt.py", run_name="__main__")      as `python -m patches --trace out/tp2` does

Megatron-LM's loop looks `train_step` up in its own module at every step, and sets what finalizes gradients just before
the first: only there is the trace as it is around a loop of one's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from patches.imports import when_imported
from tpcheck.config.load import parse_trace
from tpcheck.errors import TpcheckError
from tpcheck.trace.record.noise import nudged_folder
from tpcheck.trace.record.recording import record
from tpcheck.trace.record.store import require_untraced

__all__ = ["LOOP", "STEPS", "trace_script"]

LOOP = "megatron.training.training"
STEPS = (0, 1)


@contextlib.contextmanager
def trace_script(path: str | Path, steps: Collection[int] = STEPS, perturb: int = 0) -> Iterator[None]:
    """Trace the Megatron-LM script that runs inside, on every rank.

    Args:
        path: the trace's folder, without an earlier trace. With `perturb`, where the trace that says what rounding may
            do to the one in `path` goes by itself: `path`/noise-`perturb`.
        steps: numbers of steps, from 0 at the first that the script makes.
        perturb: a seed other than 0 nudges what is computed by one rounding.

    Raises TpcheckError where the folder holds a trace, and where the script ends without a step that was wanted.
    """
    options = parse_trace({"steps": steps, "perturb": perturb})
    folder = nudged_folder(Path(path), perturb) if perturb else Path(path)
    require_untraced(folder)
    loop = _Loop(folder, steps, options.perturb)
    call_off = when_imported(LOOP, loop.hook)
    try:
        yield
    except SystemExit as done:
        if not done.code:  # scripts may end so when nothing is wrong
            loop.close()
            loop.require_traced()
        raise
    finally:
        call_off()
        loop.unhook()
    loop.close()
    loop.require_traced()


class _Loop:
    """Megatron-LM's training loop, seen through its calls of `train_step`."""

    def __init__(self, folder: Path, steps: Collection[int], perturb: int) -> None:
        self.folder, self.steps, self.perturb = folder, steps, perturb
        self.made = 0
        self.trace = contextlib.ExitStack()
        self.undo = contextlib.ExitStack()

    def hook(self, module: ModuleType) -> None:
        original: Any = module.train_step
        signature = inspect.signature(original)

        @functools.wraps(original)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            if not self.made:
                model = signature.bind(*args, **kwargs).arguments["model"]
                self.trace.enter_context(record(self.folder, model, steps=self.steps, perturb=self.perturb))
            answer = original(*args, **kwargs)
            self.made += 1
            if self.made > max(self.steps):
                self.close()
            return answer

        module.train_step = train_step  # type: ignore[attr-defined]
        self.undo.callback(setattr, module, "train_step", original)

    def unhook(self) -> None:
        self.undo.close()

    def close(self) -> None:
        """Make the trace whole; a second time does nothing."""
        self.trace.close()

    def require_traced(self) -> None:
        if not self.made:
            raise TpcheckError(f"nothing to trace: the script has never called {LOOP}.train_step; put tpcheck.trace "
                               "around its own loop")  # fmt: skip
        if self.made <= min(self.steps):
            raise TpcheckError(f"the script has made {self.made} steps, none of steps={sorted(self.steps)}: ask for "
                               "one of them")  # fmt: skip
