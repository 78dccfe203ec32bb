"""The stock and the `tree` MLP on some devices: digests of output, gradients and trained weights, all gathered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpcheck.study.keras_jax.hlo import collectives
from tpcheck.study.keras_jax.layers import AXIS, KINDS, output_and_gradients, trained
from tpcheck.study.keras_jax.operands import operands

__all__ = ["digests"]

SPECS = {"w1": P(None, AXIS), "b1": P(AXIS), "w2": P(AXIS, None), "b2": P()}


def digests(
    tokens: int, hidden: int, ffn: int, steps: int, dtypes: list[str], values: bool = False
) -> dict[str, dict[str, Any]]:
    """{"stock fp32": {"bits", "trained", "collectives", "local", "values"}, …} on all devices of this process.

    Args:
        values: also the output and gradients themselves, as bytes in hexadecimal.
    """
    jax.config.update("jax_enable_x64", True)
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    found = {}
    for dtype in dtypes:
        p, x, dy = _data(tokens, hidden, ffn, jnp.bfloat16 if dtype == "bf16" else jnp.float32)
        p = {name: jax.device_put(value, NamedSharding(mesh, SPECS[name])) for name, value in p.items()}
        for kind in KINDS:
            found[f"{kind} {dtype}"] = _one(kind, mesh, p, x, dy, steps, values)
    return found


def _data(tokens: int, hidden: int, ffn: int, dtype: Any) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    made = {n: jnp.asarray(v.astype(np.float32)).astype(dtype) for n, v in operands(tokens, hidden, ffn).items()}
    return {name: made[name] for name in SPECS}, made["x"], made["dy"]


def _one(
    kind: str, mesh: Mesh, p: dict[str, jax.Array], x: jax.Array, dy: jax.Array, steps: int, values: bool
) -> dict[str, Any]:
    once = _sharded(lambda p, x, dy: output_and_gradients(kind, p, x, dy), mesh, {
        "y": P(), "dx": P(), **{f"d{name}": spec for name, spec in SPECS.items()}})  # fmt: skip
    program = once.lower(p, x, dy).compile()
    out = {name: np.asarray(value) for name, value in program(p, x, dy).items()}
    after = _sharded(lambda p, x, dy: trained(kind, 1, p, x, dy), mesh, SPECS)
    weights = p
    for _ in range(steps):
        weights = after(weights, x, dy)
    return {
        "bits": {name: _digest(value) for name, value in out.items()},
        "trained": {name: _digest(np.asarray(value)) for name, value in weights.items()},
        "collectives": collectives(program.as_text()),
        "local": {name: list(value.addressable_shards[0].data.shape) for name, value in p.items()},
        "values": {name: value.tobytes().hex() for name, value in out.items()} if values else {},
    }


def _sharded(function: Callable[..., Any], mesh: Mesh, out_specs: dict[str, P]) -> Any:
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(SPECS, P(), P()), out_specs=out_specs, check_vma=False))


def _digest(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
