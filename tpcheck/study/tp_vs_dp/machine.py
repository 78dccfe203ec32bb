"""Which attention really runs, and which settings of the environment touch a sum: what `tpcheck doctor` says."""

from __future__ import annotations

import dataclasses
from typing import Any

from tpcheck.config.schema import RunConfig
from tpcheck.doctor.command import examine
from tpcheck.study.ranks import on_ranks
from tpcheck.study.study import Progress
from tpcheck.study.tp_vs_dp.settings import TpVsDp

__all__ = ["machine"]


def machine(settings: TpVsDp, progress: Progress) -> dict[str, Any]:
    """The doctor's lines on this machine, for the stock run and for the patched one."""
    found = {}
    for number, strategy in enumerate(("stock", "tree")):
        progress(number / 2, strategy)
        (found[strategy],) = on_ranks(1, _examined, settings.run(strategy=strategy))
    return found


def _examined(config: RunConfig) -> list[dict[str, Any]]:
    """In a process of its own: attention starts threads, and who has some must not fork a training run."""
    return [dataclasses.asdict(line) for line in examine(config)]
