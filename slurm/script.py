"""The batch script of an array of cells: text, from a profile, an allocation and names; nothing is submitted here.

    #SBATCH …                     what the profile says, what the allocation needs
    # setup                       the profile's lines; which cell; where the ranks meet; environment
    # command                     srun … python DIR/code/DIGEST train CELL/run.yaml --resume
    # teardown                    complete, queue again, or failed

What a job does around its step is requeue.sh, in the same copy of the code. Our command takes the place of
submitit's own, so that no job ever unpickles anything. Values are quoted with `shlex`, lines can't be added:
`profile.plain` refused every control character.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slurm.allocation import Allocation
from slurm.profile import Profile, plain
from slurm.sbatch import render
from tpcheck.errors import TpcheckError, shown

__all__ = ["Script"]

# As in train.sbatch and sweep.sbatch: a job that could not queue again must not train.
SOURCE = """
# shellcheck source=/dev/null
if ! source "$requeue" || ! declare -F finish >/dev/null; then
    echo "tpcheck: cannot read $requeue, which queues jobs again: nothing is trained" >&2
    exit 1
fi
""".strip()


@dataclass(frozen=True)
class Script:
    """An array of cells with one allocation.

    Attributes:
        profile: the site.
        allocation: what it is asked for.
        name: the job's, unique.
        cells: names, in array order.
        output: the sweep's directory, which holds the cells.
        code: the copy of the packages to run.
        folder: for this script and the jobs' output.
        cwd: where the sweep was called; relative paths of runs start there.
    """

    profile: Profile
    allocation: Allocation
    name: str
    cells: tuple[str, ...]
    output: Path
    code: Path
    folder: Path
    cwd: Path

    @cached_property
    def text(self) -> str:
        """The script, exactly as sbatch gets it."""
        return render(
            self._command(),
            self._path(self.folder),
            len(self.cells),
            self.options,
            job_name=self.name,
            time=self.profile.time,
            signal_delay_s=self.profile.save_before_end,
            nodes=self.allocation.nodes,
            ntasks_per_node=1 if self._torchrun else self.allocation.ranks_per_node,
            array_parallelism=self.profile.throttle,
            setup=self._setup(),
            teardown=["finish"],
        )

    @cached_property
    def options(self) -> dict[str, Any]:
        """Options of sbatch beside those above; what the user passes through overrides what follows from the rest."""
        profile, arch, ranks = self.profile, self.allocation.machine, self.allocation.ranks_per_node
        options = {
            "partition": arch.partition or profile.partition,
            "constraint": arch.constraint,
            "account": profile.account,
            "qos": profile.qos,
            "reservation": profile.reservation,
            "exclusive": profile.exclusive or None,
            "chdir": self._path(self.cwd),
            "requeue" if profile.max_retries else "no-requeue": True,
            "cpus-per-task": self._cpus(),
        }
        if arch.gres:
            options["gres"] = f"{arch.gres}:{ranks}"
        elif arch.gpus_per_node and arch.request_gpus:
            options["gpus-per-node"] = ranks
        options |= profile.sbatch | arch.sbatch
        if strange := [value for value in options.values() if "\\" in str(value)]:
            raise TpcheckError(f"{strange[0]}: sbatch takes every backslash away: leave it out")
        return {key: value for key, value in options.items() if value is not None}

    def _setup(self) -> list[str]:
        lines = [
            *(["set -e", *self.profile.setup, "set +e"] if self.profile.setup else []),
            f"output={shlex.quote(self._path(self.output))}",
            f"cells=({shlex.join(self.cells)})",
            "cell=$output/${cells[${SLURM_ARRAY_TASK_ID:-0}]}",
            f"requeue={shlex.quote(self._path(self.code / 'slurm' / 'requeue.sh'))}",
            SOURCE,
            "meet",
            *(f"export {name}={shlex.quote(value)}" for name, value in self._env.items()),
            f'begin "$cell" {self.profile.max_retries}',
        ]
        return "\n".join(lines).split("\n")

    def _command(self) -> str:
        """The step, started in the background, so that the shell hears signals meanwhile."""
        words = ["srun", "--label", "--export=ALL", "--kill-on-bad-exit=1", *self._srun()]
        code = shlex.quote(self._path(self.code))  # with -m, Python would prefer what is in the working directory
        if self._torchrun:
            # USR2 reaches every process of the step; torchrun would die of it before the ranks have saved.
            words += ["bash", "-c", 'trap "" USR2; PET_NODE_RANK=$SLURM_NODEID exec "$@"', "torchrun"]
            words += [*self.profile.command, "-m", "torch.distributed.run", f"--nnodes={self.allocation.nodes}"]
            words += [f"--nproc-per-node={self.allocation.ranks_per_node}"]
            start = f' --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" {code}'
            # shellcheck can't know that the quoted variable is for the inner shell.
            return f'# shellcheck disable=SC2016\n{shlex.join(words)}{start} train "$cell/run.yaml" --resume &'
        return f'{shlex.join([*words, *self.profile.command])} {code} train "$cell/run.yaml" --resume &'

    @property
    def _env(self) -> dict[str, str]:
        return self.profile.env | self.allocation.machine.env

    @property
    def _torchrun(self) -> bool:
        return self.profile.launcher == "torchrun"

    def _cpus(self) -> int | None:
        """CPUs of a task: of one rank, or of torchrun with all its ranks."""
        if self.profile.cpus_per_rank is None:
            return None
        return self.profile.cpus_per_rank * (self.allocation.ranks_per_node if self._torchrun else 1)

    def _srun(self) -> list[str]:
        """The step's options: srun does not inherit --cpus-per-task from sbatch, nor a container from anywhere."""
        options: dict[str, Any] = {"cpus-per-task": self._cpus()}
        container = self.profile.container
        if container:
            mounts = [*container.mounts, f"{self._path(self.output)}:{self._path(self.output)}"]
            options |= {"container-image": container.image, "container-mounts": ",".join(mounts)}
            # What an image sets itself overrides what srun passes on, unless it is named.
            options |= {"container-workdir": container.workdir, "container-env": ",".join(self._env) or None}
            options |= container.srun
        options |= self.profile.srun
        given = {key: value for key, value in options.items() if value is not None}
        return [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]

    def _path(self, path: Path) -> str:
        """A path as a script may hold it: sbatch replaces % and drops backslashes, some characters end its line."""
        text = str(path.absolute())
        try:
            plain(text)
        except ValueError as error:
            raise TpcheckError(f"path {shown(text)}: {error}") from None
        if "%" in text:
            raise TpcheckError(f"path {text}: sbatch would replace the % in it: use another")
        if "\\" in text:
            raise TpcheckError(f"path {text}: sbatch takes every backslash away: use another")
        return text
