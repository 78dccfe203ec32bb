"""From where a run may go on: only settings that do not change what is computed may differ from the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpcheck.checkpoint.reader import Checkpoint
from tpcheck.config.differences import settings_differences
from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError, shortened
from tpcheck.files import result_dir
from tpcheck.files.names import STEPS, TRACE
from tpcheck.run.provenance import versions

__all__ = ["continued", "resume_point", "without"]

MAY_CHANGE = {
    "tp",
    "pp",
    "vpp",
    "dp",
    "cp",
    "ep",
    "etp",
    "sequence_parallel",
    "distributed_optimizer",
    "recompute",
    "gradient_accumulation_fusion",
    "symmetric_memory",
    "micro_batch_size",
    "threads",
    "steps",
    "stop_after",
    "trace",
    "checkpoint_every",
    "output",
}


def continued(before: dict[str, Any], now: dict[str, Any], step: int) -> dict[str, Any]:
    """The manifest of a run that goes on from `step`; what it was before is kept in `history`."""
    if (digest := (before.get("data") or {}).get("digest")) != now["data"]["digest"]:
        raise TpcheckError(
            f"the data have changed since this run began (digest {str(digest)[:12]}, now "
            f"{now['data']['digest'][:12]}): restore them, or start a new run in another output"
        )
    products = result_dir.products(before)
    if products != now["products"]:
        raise TpcheckError(
            f"this run's products were of another kind, {_short(products, now['products'])}, here they are "
            f"{_short(now['products'], products)}: resume on what it began on, or start a new run"
        )
    past = {key: value for key, value in before.items() if key not in ("format", "history", "data")}
    history = [*before.get("history", []), {**past, "until_step": step}]
    return {**now, "attention": before.get("attention"), "history": history}  # until a step of its own has run


def resume_point(config: RunConfig, resume: bool) -> int:
    """The step whose checkpoint this run goes on from, 0 to begin; refuses what would spoil an earlier run.

    What a killed run left of a trace that is to be made is removed.
    """
    output = Path(config.output)
    if not result_dir.is_result(output):
        return 0
    if not resume:
        raise TpcheckError(f"{output} holds a run already: go on with --resume, or name another output")
    before = result_dir.read_manifest(output)["config"]
    now = config.model_dump(mode="json")
    differing = {name.partition(".")[0] for name in settings_differences(before, now, ignore=_may_change())}
    for key in [key for key in now if key in differing]:
        raise TpcheckError(
            f"{output} was trained with {key}={_short(before.get(key), now[key])}, not "
            f"{_short(now[key], before.get(key))}: resume with the same {key}, or name another output"
        )
    saved = result_dir.checkpoints(output)
    step = saved[-1][0] if saved else 0
    if step > config.steps:
        raise TpcheckError(f"{output} is at step {step} already, beyond steps={config.steps}")
    if step:
        checkpoint = result_dir.checkpoint_path(output, step)
        try:
            Checkpoint(checkpoint)
        except TpcheckError as error:  # it is damaged
            raise TpcheckError(f"{error} {without(checkpoint)}") from error
        _require_steps(output, step, checkpoint)
    _make_room_for_trace(config, before, step)
    return step


def without(checkpoint: Path) -> str:
    """The way out where a run's last checkpoint cannot be gone on from."""
    return f"(without {checkpoint}, the run goes on from what was saved before)"


def _require_steps(output: Path, step: int, checkpoint: Path) -> None:
    """Refuse a record that ends before the checkpoint, as that of a copy made meanwhile may: no reader takes gaps."""
    recorded = result_dir.read_steps(output)
    if recorded and recorded[-1]["step"] < step:
        raise TpcheckError(
            f"{output / STEPS} ends at step {recorded[-1]['step']}, {checkpoint} is of step {step}: restore it "
            f"{without(checkpoint)}"
        )


def _make_room_for_trace(config: RunConfig, before: dict[str, Any], step: int) -> None:
    """Refuse a trace that cannot be made, but for one that the run has made; remove what a killed run left of one."""
    from tpcheck.trace.record.store import discard_unfinished, require_untraced

    trace, folder = config.trace, Path(config.output, TRACE)
    if not trace or not trace.steps:
        return
    if step <= max(trace.steps):
        discard_unfinished(folder)
        require_untraced(folder, "move it away, and the steps to come are traced, or go on with trace=null")
    elif before.get("trace") != trace.model_dump(mode="json"):
        raise TpcheckError(
            f"trace.steps={sorted(trace.steps)} are done, this run goes on from step {step}: name later ones, "
            "or trace=null"
        )


def _may_change() -> set[str]:
    # megatron-core 0.14 saves the distributed optimizer's state flattened, and loads it only so.
    saved_flat = versions().get("megatron-core", "").startswith("0.14.")
    return MAY_CHANGE - {"distributed_optimizer"} if saved_flat else MAY_CHANGE


def _short(value: Any, other: Any) -> str:
    """Only the entries of a section that differ from those of the other one."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: value[key] for key in value if value[key] != other.get(key)}
    return shortened(str(value))
