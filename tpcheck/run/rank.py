"""One rank of a run, from its imports to its end."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.files.names import LOG
from tpcheck.run.heartbeat import Pulse, Watch
from tpcheck.run.log_redirect import to_log
from tpcheck.run.place import Place
from tpcheck.run.prepared import Prepared

__all__ = ["SIGNALS", "prepare", "run_rank"]

SIGNALS = {signal.SIGTERM, signal.SIGUSR2, signal.SIGINT}  # each asks a run to save and leave


def prepare(config: RunConfig, before_forking: bool = False) -> Prepared:
    """Import everything heavy, refuse what can be refused without other ranks, open the data.

    Args:
        before_forking: CUDA, which forked ranks could not use, must not be started.
    """
    if before_forking:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks for GPUs without starting CUDA
    with _quiet_imports():
        import psutil  # noqa: F401  without it Megatron's checkpoint writer hangs
        import torch

        import tpcheck.run.train  # noqa: F401
        from tpcheck.run.data import open_data
        from tpcheck.run.model import transformer_config

        model = transformer_config(config)
    if before_forking and torch.cuda.is_initialized():  # by TE's import, which asks what flash-attn can do on the GPU
        raise TpcheckError(
            "an import has started CUDA, which ranks forked from here could not use: start them with "
            f"torchrun --nproc-per-node={config.world_size} -m tpcheck train …"
        )
    return Prepared(config, model, open_data(config))


def run_rank(prepared: Prepared, place: Place, start: int | None, pulse: Pulse | None = None) -> None:
    """Train as the rank at `place`; all that is printed goes to the log, errors with their traceback.

    Args:
        start: the step to go on from, 0 to begin; None on a rank that asks rank 0.
        pulse: where the launcher looks for signs of life.

    Raises:
        TpcheckError: bad input, also what the patches do not cover.
    """
    from patches import UnsupportedError
    from tpcheck.run.train import Stop, train

    stop = Stop(SIGNALS, Watch(place.rank, pulse))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with to_log(Path(prepared.config.output) / LOG, place.rank) as display:
        try:
            train(prepared, place, start, stop, display)
        except UnsupportedError as error:
            raise TpcheckError(str(error)) from error
        except TpcheckError:
            raise
        except BaseException:
            traceback.print_exc()
            raise


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    # megatron-core warns seven times that Apex and Transformer Engine are not installed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ModuleNotFoundError as error:
            raise TpcheckError(f"{error}: install {error.name}, which megatron-core or tpcheck needs") from error
