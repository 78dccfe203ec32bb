"""Where submitit comes in: it lays batch scripts out and hands them to sbatch, without its pickles and its launcher.

Both are functions that it keeps to itself; nothing else here calls one of those.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm import slurm as submitit_slurm

from tpcheck.errors import TpcheckError

__all__ = ["render", "submit"]

# What these say in the environment overrides the script, and would spoil it; so does what names one of its options.
SBATCH_VARIABLES = "JOB_NAME ARRAY_INX OPEN_MODE REQUEUE NO_REQUEUE SIGNAL TIMELIMIT EXPORT WAIT CLUSTERS".split()
# A job inherits these from a job that submits it, where it has none of its own.
SLURM_VARIABLES = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


def render(command: str, folder: str, elements: int, options: dict[str, Any], **parameters: Any) -> str:
    """The text of a batch script.

    Args:
        command: the step, in shell.
        folder: for the job's output.
        elements: of the array; a single one is no array.
        options: of sbatch, by their long names.
        parameters: whatever else submitit knows by a name of its own.
    """
    if elements > 1:
        parameters["map_count"] = elements
    return submitit_slurm._make_sbatch_string(
        command=command, folder=folder, additional_parameters=options,
        stderr_to_stdout=True, use_srun=False, wckey=None, **parameters,
    )  # fmt: skip


def submit(text: str, folder: Path, cells: Collection[str], options: Collection[str]) -> str:
    """Submit the script `text` of these cells, which is kept in `folder`.

    Args:
        options: those of sbatch that the script holds; the environment must not override one.

    Returns:
        The number that Slurm has given it.

    Raises:
        TpcheckError: sbatch refuses it.
    """
    try:
        # submitit repeats on stderr what its error says.
        with _without_variables(options), contextlib.redirect_stderr(io.StringIO()):
            return str(_Executor(folder, text)._submit_command("").job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        raise TpcheckError(f"sbatch refuses {', '.join(cells)}: {error}") from error


class _Executor(submitit.SlurmExecutor):
    """submitit's, for a script that is there already."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(folder)
        self.text = text

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.text


@contextlib.contextmanager
def _without_variables(options: Collection[str]) -> Iterator[None]:
    """Nothing in the environment decides what the script says: a cell named after an H100 must run on one."""
    given = [option.upper().replace("-", "_") for option in options]
    names = [*SLURM_VARIABLES, *(f"SBATCH_{name}" for name in (*SBATCH_VARIABLES, *given))]
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})
