"""The batch script of an array of cells: text, from a profile, a shape and names; nothing is submitted here.

    #SBATCH …                     what the profile says, what the shape needs
    # setup                       the profile's lines; which cell; where the ranks meet; environment
    # command                     srun … python DIR/code/DIGEST train CELL/run.yaml --resume
    # teardown                    complete, queue again, or failed: see END

submitit lays the file out; our command takes the place of its own, so that no job ever unpickles anything. Values
are quoted with `shlex`, lines can't be added: `profile.plain` refused every control character.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm import slurm as submitit_slurm

from slurm.allocation import Shape
from slurm.profile import Arch, Profile, plain
from tpcheck.errors import TpcheckError

__all__ = ["Script"]

# These parts stand in train.sbatch and sweep.sbatch, too, word for word.
MEET = r"""
restart=${SLURM_RESTART_COUNT:-0}
# The number of an array's last element is that of the array: only this name means this element alone.
this=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this=${this:-$SLURM_JOB_ID}

# Where the ranks meet: a port for every start, so that what a lost node still runs cannot join. What the shell
# that submitted this had been told of ranks is not meant for them.
unset RANK LOCAL_RANK WORLD_SIZE TPCHECK_STORE
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + restart) % 12000))
export MASTER_ADDR MASTER_PORT
""".strip()

NOTES = r"""
export TPCHECK_ENDS=$cell/ends.jsonl # the ranks write there why they end
rm -f "$TPCHECK_ENDS"
printf '{"job": "%s", "array_index": %d, "restart": %d, "nodes": "%s", "began": "%s", "job_name": "%s"}\n' \
    "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" "${SLURM_ARRAY_TASK_ID:-0}" "$restart" \
    "$SLURM_JOB_NODELIST" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$SLURM_JOB_NAME" >>"$cell/attempts.jsonl"
echo "tpcheck: ${cell##*/} on $SLURM_JOB_NODELIST, start $((restart + 1))"
""".strip()

AGAIN = r"""
# A controller that is being restarted does not answer for a while.
patiently() {
    local _
    for _ in {1..12}; do "$@" && return 0; sleep 10; done
    return 1
}
state() { patiently squeue --noheader --job="$this" --states=all --format='%T %r'; }
ended() { grep -qs "\"kind\": \"$1\"" "$TPCHECK_ENDS"; }

# Queues this job again, to go on from the cell's last checkpoint. When Slurm itself is ending it, it was cancelled,
# and would come back to life, or preempted, which Slurm sees to; only at the time limit the choice is ours.
again() {
    [[ ! -e $cell/cancelled && $(state) =~ ^(RUNNING|SIGNALING)|TimeLimit$ ]] || return 0
    if ((restart >= max_retries)); then
        echo "tpcheck: not queued again, after $max_retries times: call tpcheck sweep to go on"
    elif patiently scontrol requeue "$this"; then
        echo "tpcheck: queued again"
        exit 0
    fi
}
if [[ -e $cell/cancelled ]]; then exit 0; fi
if ((restart > max_retries)); then # by Slurm itself: a lost node, a preemption
    echo "tpcheck: not started again, after $max_retries times: call tpcheck sweep to go on"
    exit 1
fi
trap '[[ $(state) != *TimeLimit ]] || again' TERM # too late to save: at least the last checkpoint counts
""".strip()

END = r"""
step=$!
while :; do # a signal to this shell ends `wait`, not the step
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done
# Written last: the cell is complete. Unless it is older than this start, which then must have found nothing to do.
if [[ $cell/digests.json -nt $cell/attempts.jsonl || (-e $cell/digests.json && $code == 0) ]]; then
    exit 0
elif ended failed; then # an error of the user's or ours: it would recur
    exit "$((code ? code : 1))"
elif ((code == 0 || code >= 128)) || ended stopped || ended lost; then # told to save and leave; killed; lost a rank
    again
fi
exit "$((code ? code : 1))"
""".strip()


@dataclass(frozen=True)
class Script:
    """An array of cells of one shape.

    Parameters
    ----------
    profile, shape: the site, and what it is asked for
    name: the job's, unique
    cells: names, in array order
    output: the sweep's directory, which holds the cells
    code: the copy of the packages to run
    folder: for this script and the jobs' output
    cwd: where the sweep was called; relative paths of runs start there
    """

    profile: Profile
    shape: Shape
    name: str
    cells: tuple[str, ...]
    output: Path
    code: Path
    folder: Path
    cwd: Path

    def text(self) -> str:
        """The script, exactly as submitit would hand it to sbatch."""
        count = {"map_count": len(self.cells)} if len(self.cells) > 1 else {}
        return submitit_slurm._make_sbatch_string(
            command=self.command(), folder=self._path(self.folder), **self.parameters(), **count
        )

    def parameters(self) -> dict[str, Any]:
        """The script's other parts, as submitit's parameters."""
        return {
            "job_name": self.name,
            "time": self.profile.time,
            "signal_delay_s": self.profile.save_before_end,
            "nodes": self.shape.nodes,
            "ntasks_per_node": 1 if self._torchrun else self.shape.ranks_per_node,
            "array_parallelism": self.profile.throttle,
            "stderr_to_stdout": True,
            "use_srun": False,
            "wckey": None,
            "additional_parameters": self._sbatch(),
            "setup": self._setup(),
            "teardown": END.split("\n"),
        }

    def command(self) -> str:
        """The step, started in the background, so that the shell hears signals meanwhile."""
        words = ["srun", "--label", "--export=ALL", "--kill-on-bad-exit=1", *self._srun()]
        code = shlex.quote(self._path(self.code))  # with -m, Python would prefer what stands in the working directory
        if self._torchrun:
            # USR2 reaches every process of the step; torchrun would die of it before the ranks have saved.
            words += ["bash", "-c", 'trap "" USR2; PET_NODE_RANK=$SLURM_NODEID exec "$@"', "torchrun"]
            words += [*self.profile.command, "-m", "torch.distributed.run", f"--nnodes={self.shape.nodes}"]
            words += [f"--nproc-per-node={self.shape.ranks_per_node}"]
            start = f' --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" {code}'
            # shellcheck can't know that the quoted variable is for the inner shell.
            return f'# shellcheck disable=SC2016\n{shlex.join(words)}{start} train "$cell/run.yaml" --resume &'
        return f'{shlex.join([*words, *self.profile.command])} {code} train "$cell/run.yaml" --resume &'

    @property
    def _arch(self) -> Arch:
        return self.profile.architectures[self.shape.arch]

    @property
    def _torchrun(self) -> bool:
        return self.profile.launcher == "torchrun"

    def _sbatch(self) -> dict[str, Any]:
        """All other options of sbatch; what the user passes through goes before what follows from the rest."""
        profile, arch, ranks = self.profile, self._arch, self.shape.ranks_per_node
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

    def _cpus(self) -> int | None:
        """CPUs of a task: of one rank, or of torchrun with all its ranks."""
        if self.profile.cpus_per_rank is None:
            return None
        return self.profile.cpus_per_rank * (self.shape.ranks_per_node if self._torchrun else 1)

    def _setup(self) -> list[str]:
        env = self.profile.env | self._arch.env
        lines = [
            *(["set -e", *self.profile.setup, "set +e"] if self.profile.setup else []),
            f"output={shlex.quote(self._path(self.output))}",
            f"cells=({shlex.join(self.cells)})",
            "cell=$output/${cells[${SLURM_ARRAY_TASK_ID:-0}]}",
            f"max_retries={self.profile.max_retries}",
            MEET,
            *(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
            NOTES,
            "",
            AGAIN,
        ]
        return "\n".join(lines).split("\n")

    def _srun(self) -> list[str]:
        """The step's options: srun does not inherit --cpus-per-task from sbatch, nor a container from anywhere."""
        options: dict[str, Any] = {"cpus-per-task": self._cpus()}
        container = self.profile.container
        if container:
            mounts = [*container.mounts, f"{self._path(self.output)}:{self._path(self.output)}"]
            # What an image sets itself goes before what srun passes on, unless it is named.
            names = list(self.profile.env | self._arch.env)
            options |= {"container-image": container.image, "container-mounts": ",".join(mounts)}
            options |= {"container-workdir": container.workdir, "container-env": ",".join(names) or None}
            options |= container.srun
        options |= self.profile.srun
        given = {key: value for key, value in options.items() if value is not None}
        return [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]

    def _path(self, path: Path) -> str:
        """A path as a script may hold it: sbatch replaces %, and some characters would end its line."""
        text = str(path.absolute())
        try:
            plain(text)
        except ValueError as error:
            raise TpcheckError(f"path {text!r}: {error}") from None
        if "%" in text:
            raise TpcheckError(f"path {text}: sbatch would replace the % in it: use another")
        return text
