"""The `tpcheck` command: thin commands, each imported only when it is called, so that `--help` is quick.

Exit codes: what the command returns (`diff`: 0 identical, 1 different, 2 can't tell), 2 for bad input, which is
answered with one line on standard error, 130 for Ctrl-C, 141 when the reader of the output has gone, 70 for a bug
in tpcheck, which shows its traceback.
"""

from __future__ import annotations

import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tpcheck import __version__
from tpcheck.config.strategies import STRATEGIES
from tpcheck.cost.datasheets import GPUS
from tpcheck.errors import LETTERS, TpcheckError, missing_package, shortened
from tpcheck.order.setting import TARGETS
from tpcheck.study.names import STUDIES

__all__ = ["main"]

BAD_INPUT, BUG, INTERRUPTED, PIPE_CLOSED = 2, 70, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv[1:]` by default) and return its exit code."""
    _open_streams()
    try:
        return int(tpcheck.main(args=arguments, prog_name="tpcheck", standalone_mode=False) or 0)
    except TpcheckError as error:
        return _refuse(str(error))
    except click.ClickException as error:
        return _refuse(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        if message := missing_package(error):
            return _refuse(message)
        traceback.print_exc()
        return BUG


def _open_streams() -> None:
    """Standard streams that whoever started this has closed, or that lack our letters, end no command."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _refuse(message: str) -> int:
    words = re.sub(rf"[^\s/]{{{2 * LETTERS},}}", lambda word: shortened(word[0]), message).split()
    print("tpcheck: error:", *words, file=sys.stderr)
    return BAD_INPUT


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> int:
        """Run the command; when the reader of its output goes away, as `head` does, end quietly."""
        try:
            status: int = super().invoke(ctx)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED


@click.group(cls=_Commands, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="tpcheck %(version)s")
def tpcheck() -> None:
    """Megatron training that gives the same bits at every tensor-parallel size, and the proof of it."""


@tpcheck.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on from the last complete checkpoint of the output.")
def train(run: Path, overrides: tuple[str, ...], resume: bool) -> int:
    """Train the run that RUN.yaml describes; `tp=2` or `optimizer.lr=1e-4` overrides a key of it."""
    from tpcheck.run.launch import command

    return command(run, overrides, resume)


@tpcheck.command(name="hash")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor with its digest.")
@click.option("--all", "everything", is_flag=True, help="List what else it holds: groups, counters, generators.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def hash_(checkpoint: Path, tensors: bool, everything: bool, as_json: bool) -> int:
    """Print the logical digests of CHECKPOINT, or of the last checkpoint of a result directory."""
    from tpcheck.checkpoint.digest import command

    return command(checkpoint, tensors=tensors or everything, everything=everything, as_json=as_json)


@tpcheck.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--all", "show_all", is_flag=True, help="List all that differs, not only the first ten.")
@click.option("--verify", is_flag=True, help="Digest the checkpoints anew, whatever is on record.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def diff(a: Path, b: Path, show_all: bool, verify: bool, as_json: bool) -> int:
    """Compare two result directories or two checkpoints: 0 identical, 1 different, 2 can't tell."""
    from tpcheck.checkpoint.diff_text import command

    return command(a, b, show_all=show_all, verify=verify, as_json=as_json)


@tpcheck.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--seeds", type=click.IntRange(1, 99), default=3, show_default=True, help="How many nudged runs of A.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML page with pictures to this file.")
@click.option("--all", "show_all", is_flag=True, help="Show every tensor, not only the telling ones.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def compare(a: Path, b: Path, seeds: int, report: Path | None, show_all: bool, as_json: bool) -> int:
    """Judge the traced run B by A, module by module: 0 identical or rounding, 1 suspect, 2 can't tell."""
    from tpcheck.run.nudged import make_nudged_runs
    from tpcheck.trace.compare.command import command

    nudge = functools.partial(make_nudged_runs, seeds=seeds)
    return command(a, b, nudge=nudge, show_all=show_all, as_json=as_json, report=report)


@tpcheck.command()
@click.argument("target", type=click.Choice(list(TARGETS)))
@click.option("--strategy", type=click.Choice(STRATEGIES), default="stock", show_default=True)
@click.option("--tp", help="Tensor-parallel sizes to compare.  [default: 1,2,4,8]")
@click.option("--size", type=int, help="Summands, 32 if not given; of all-reduce, ranks, 4 if not given.")
@click.option("--rows", default=8, show_default=True, help="Tokens of the result.")
@click.option("--columns", default=8, show_default=True, help="Features of the result.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--sp", is_flag=True, help="Sequence parallelism; norm has it always.")
@click.option("--threads", default=1, show_default=True, help="Threads of every rank.")
@click.option("--draw", type=click.Path(path_type=Path), help="Draw the trees to this .svg, .png or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def order(target: str, draw: Path | None, as_json: bool, **options: Any) -> int:
    """Reveal in which order TARGET adds its summands: 0 the same everywhere, 1 not, 2 can't tell.

    Targets: row-parallel (forward), column-parallel and gated (input gradients; gated: a SwiGLU's first layer), norm
    (gamma's gradient), gemm (a local product as TP narrows it), all-reduce.
    """
    from tpcheck.order.command import command

    return command(target, draw=draw, as_json=as_json, **options)


@tpcheck.command()
@click.argument("target", required=False, metavar="[RUN.yaml|PRESET]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(target: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Say what this machine has, and whether the promise of RUN.yaml or PRESET can be kept on it: 0 it can, 1 not.

    Attention kernels are really run, with all heads and with those that other TP sizes see.
    """
    from tpcheck.doctor.command import command

    return command(target, overrides, as_json)


@tpcheck.command()
@click.argument("model", metavar="PRESET|RUN.yaml")
@click.option("--tp", type=click.IntRange(min=1), help="Tensor-parallel size.  [default: 8 for a preset]")
@click.option(
    "--gpu", type=click.Choice(list(GPUS)), default="h100", show_default=True, help="Datasheet for the floor."
)
@click.option("--seq", "seq_length", type=click.IntRange(min=1), help="Tokens of a sequence.  [default: 4096]")
@click.option("--micro-batch", "micro_batch_size", type=click.IntRange(min=1), help="Sequences of a microbatch.")
@click.option("--global-batch", "global_batch_size", type=click.IntRange(min=1), help="Sequences of a step.")
@click.option("--sp/--no-sp", "sequence_parallel", default=None, help="Sequence parallelism.")
@click.option("--recompute/--no-recompute", default=None, help="Layers run forward twice.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]))
@click.option("--batch", type=click.Choice(["order-free"]), help="Sums over the batch without an order.")
@click.option("--cp", type=click.IntRange(min=1), help="Context-parallel size, of sums without an order.")
@click.option("--chunks", type=click.IntRange(min=1), help="Chunks of a sequence.  [default: 2 * cp]")
@click.option("--ep", type=click.IntRange(min=1), help="Expert-parallel size, of a mixture of experts.")
@click.option("--etp", type=click.IntRange(min=1), help="Tensor-parallel size of experts.  [default: as --tp]")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def cost(model: str, gpu: str, as_json: bool, **options: Any) -> int:
    """What a step of a model costs on paper: FLOPs, bytes and memory of a rank for stock, gather and tree."""
    from tpcheck.cost.command import command

    return command(model, gpu, as_json=as_json, **options)


@tpcheck.command()
@click.argument("name", type=click.Choice(STUDIES))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--quick", is_flag=True, help="At a size that takes less than two minutes.")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="[default: results/studies/NAME]")
def study(name: str, overrides: tuple[str, ...], quick: bool, output: Path | None) -> int:
    """Measure anew what others claimed about tensor parallelism, and write a page of it.

    What is on record for the same settings is not measured again.
    """
    from tpcheck.study.command import command

    return command(name, overrides, output, quick)


@tpcheck.command()
@click.argument("sweep", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cluster", metavar="NAME", help="Submit to Slurm as slurm/clusters/NAME.yaml, or that file, says.")
@click.option("--dry-run", is_flag=True, help="With --cluster: print the scripts that would be submitted.")
@click.option("--wait", is_flag=True, help="With --cluster: stay until every cell has ended, then give the verdict.")
@click.option("--plan", is_flag=True, help="Prepare the directory for slurm/sweep.sbatch; print the lines to submit.")
def sweep(sweep: Path, overrides: tuple[str, ...], cluster: str | None, dry_run: bool, wait: bool, plan: bool) -> int:
    """Run every cell of SWEEP.yaml that is not complete yet, then say which digests agree."""
    if plan:
        if cluster or dry_run or wait:
            raise TpcheckError("--plan submits nothing: leave --cluster, --dry-run and --wait out")
        from slurm.plan import command as prepare

        return prepare(sweep, overrides)
    if cluster is not None:
        from slurm.submit import command as submit

        return submit(sweep, overrides, cluster, dry_run=dry_run, wait=wait)
    if dry_run or wait:
        raise TpcheckError(f"--{'dry-run' if dry_run else 'wait'} is about Slurm: add --cluster NAME")
    from tpcheck.sweep.local import command

    return command(sweep, overrides)


@tpcheck.command()
@click.argument("output", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Digest the cells' last checkpoints anew, whatever is on record.")
def verdict(output: Path, verify: bool) -> int:
    """Say which digests of the sweep in DIR agree, from what is there: 0 held, 1 broken, 2 cells are missing."""
    from tpcheck.sweep.conclude import command

    return command(output, verify)


@tpcheck.command()
@click.argument("output", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until no cell is waiting or running.")
def status(output: Path, watch: bool) -> int:
    """Show every cell of the sweep in DIR: its job, state, node, step, speed, retries and log."""
    from slurm.status import command

    return command(output, watch=watch)


@tpcheck.command()
@click.argument("output", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("cells", nargs=-1, metavar="[CELL]...")
def cancel(output: Path, cells: tuple[str, ...]) -> int:
    """Cancel the Slurm jobs of the sweep in DIR, or of these cells of it alone; what they saved stays."""
    from slurm.cancel import command

    return command(output, cells)
