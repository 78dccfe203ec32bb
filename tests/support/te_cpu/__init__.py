"""Transformer Engine's own Python code on a CPU, with a stand-in for its compiled extension.

`install()` before the first import of transformer_engine or megatron: afterwards both import and run, in float32
and bfloat16, over gloo. The Python code is the real one, from the `transformer-engine` wheel (which has no
compiled part); `tensors.py` stands for the extension's functions, `machine.py` for the GPU that TE looks for.
What has no stand-in raises NotImplementedError when it is called.
"""

from tests.support.te_cpu.loading import install, needs_stand_in, te_version

__all__ = ["install", "needs_stand_in", "te_version"]
