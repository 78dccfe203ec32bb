"""Trains on megatron-core, digests what came out, and says where two runs part.

`train` runs one configuration, `hash` digests a checkpoint's logical tensors, `diff` compares two runs bit by
bit, `sweep` runs a matrix of configurations and gives the verdict. What they exchange are result directories
(`tpcheck.result`): JSON and checkpoints, nothing that has to be unpickled.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
