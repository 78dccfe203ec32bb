"""Trains on megatron-core, digests what came out, and says where two runs part.

`train` runs one configuration, `hash` digests a checkpoint's logical tensors, `diff` compares two runs bit by
bit, `trace` records a run module by module and `compare` tells rounding from a bug in two traces, `sweep` runs a
matrix of configurations and gives the verdict. What they exchange are result directories
(`tpcheck.files.result_dir`) and traces: JSON, safetensors and checkpoints, nothing that has to be unpickled.
"""

import importlib
from typing import Any

__all__ = ["__version__", "trace"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "trace":
        return importlib.import_module("tpcheck.trace")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
