"""Keras 3 and JAX: is tensor parallelism exact there, which rules does it obey, and what makes it exact?

study.py       settings and parts; findings.py, page.py: what came of them
processes.py   JAX runs in processes of its own; modules below are imported there alone
sharded.py     four Keras models on several devices (models.py, hlo.py)
rules.py       the rules of tensor parallelism, and mutants.py that break them
leaves.py      do XLA's products depend on their shape?
contract.py    the contract's layers in JAX (exact.py, layers.py) on 1, 2, 4 and 8 devices
"""

from tpcheck.study.keras_jax.study import STUDY

__all__ = ["STUDY"]
