"""Where submitit comes in: it lays batch scripts out and hands them to sbatch, without its pickles and its launcher.

What is called and replaced of it here it keeps to itself; nothing else does so.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm import slurm as submitit_slurm

from slurm import commands
from tpcheck.errors import TpcheckError, shown

__all__ = ["render", "submit"]

# All that SBATCH_* in the environment may say, where the script has no such option: everything else there overrides the
# script, and with it which machines and how many tasks a cell gets, where its output goes, whether it queues again.
DEFAULTS = ("account", "partition", "qos", "reservation", "wckey")
# A job inherits these from a job that submits it, where it has none of its own.
SLURM_VARIABLES = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
# The only ones of a job that say something about Slurm, and not about that job.
OF_SLURM = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
ANSWER = re.compile(r"^Submitted batch job (\d+)( on cluster \S+)?$", re.MULTILINE)


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
        TpcheckError: sbatch refuses it, or does not say which job it has made of it.
    """
    try:
        # submitit repeats on stderr what its error says.
        with _without_variables(options), contextlib.redirect_stderr(io.StringIO()):
            return str(_Executor(folder, text)._submit_command("").job_id)
    except FailedJobError as error:
        raise TpcheckError(f"sbatch refuses {', '.join(cells)}: {error}") from error
    except FailedSubmissionError as error:
        raise TpcheckError(f"sbatch, asked for {', '.join(cells)}: {error}") from error


class _Executor(submitit.SlurmExecutor):
    """submitit's, for a script that is there already."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(folder)
        self.text = text

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.text

    @staticmethod
    def _get_job_id_from_submission_command(string: str | bytes) -> str:
        """The number in sbatch's own line, whatever a site's wrapper prints around it."""
        text = string.decode(errors="replace") if isinstance(string, bytes) else string
        if not (found := ANSWER.findall(text)):
            raise FailedSubmissionError(
                f"the answer {shown(text)} names no job; call again: one that is there is found"
            )
        return str(found[-1][0])


@contextlib.contextmanager
def _without_variables(options: Collection[str]) -> Iterator[None]:
    """Nothing in the environment decides what the script says: a cell named after an H100 must run on one."""
    before = dict(os.environ)
    for name in before:
        if not _may_be_heard(name, options):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def _may_be_heard(name: str, options: Collection[str]) -> bool:
    """Whether sbatch and the job may see the environment variable `name`."""
    if name.startswith("SBATCH_"):
        default = name.removeprefix("SBATCH_").lower()
        return default in DEFAULTS and default not in options
    if name.startswith("SLURM_") and "SLURM_JOB_ID" in os.environ:
        return name in OF_SLURM
    return name not in SLURM_VARIABLES and not commands.is_option(name)
