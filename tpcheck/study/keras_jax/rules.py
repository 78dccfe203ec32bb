"""The rules of tensor parallelism, each with a mutant that breaks it, and what has to be looked at to see that.

A transformer layer after a vocabulary-parallel embedding, written out under `shard_map`, against the same without
devices; in float64, so that rounding (some 1e-12) and mistakes (1e-1) cannot be confused.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tpcheck.study.keras_jax.layers import AXIS, summed_backward, summed_forward
from tpcheck.study.keras_jax.mutants import MUTANTS

__all__ = ["broken", "honest_zero", "mutants_and_integers"]

VOCABULARY, HIDDEN, HEADS, WIDTH, FFN, BATCH, LENGTH = 64, 32, 8, 4, 64, 4, 8
STEPS, RATE = 3, 0.1
Params = dict[str, Array]
SPECS = {
    "embedding": P(AXIS, None), "wq": P(None, AXIS, None), "bq": P(AXIS, None), "wk": P(None, AXIS, None),
    "bk": P(AXIS, None), "wv": P(None, AXIS, None), "bv": P(AXIS, None), "wo": P(AXIS, None, None), "bo": P(),
    "w1": P(None, AXIS), "b1": P(AXIS), "w2": P(AXIS, None), "b2": P(),
}  # fmt: skip
SHAPES = {
    "embedding": (VOCABULARY, HIDDEN), "wq": (HIDDEN, HEADS, WIDTH), "bq": (HEADS, WIDTH), "wk": (HIDDEN, HEADS, WIDTH),
    "bk": (HEADS, WIDTH), "wv": (HIDDEN, HEADS, WIDTH), "bv": (HEADS, WIDTH), "wo": (HEADS, WIDTH, HIDDEN),
    "bo": (HIDDEN,), "w1": (HIDDEN, FFN), "b1": (FFN,), "w2": (FFN, HIDDEN), "b2": (HIDDEN,),
}  # fmt: skip


def mutants_and_integers() -> dict[str, Any]:
    """Both of what follows."""
    return {"mutants": broken(), "integers": honest_zero()}


def broken() -> list[dict[str, Any]]:
    """Of the right program and of every mutant, with zero and with random biases: relative differences of the loss,
    the output, the worst gradient and the loss after some steps, all against one device."""
    jax.config.update("jax_enable_x64", True)
    return [
        {"mutant": mutant, "biases": biases, **_differences(mutant, biases == "random")}
        for mutant in ("", *MUTANTS)
        for biases in ("zero", "random")
    ]


def honest_zero() -> dict[str, Any]:
    """With small integers, no softmax and float64 nothing is rounded: the differences, which are 0.0.

    Not of later steps, whose gradients are no small integers any more.
    """
    jax.config.update("jax_enable_x64", True)
    found = _differences("", True, integers=True)
    return {name: value for name, value in found.items() if name != "later loss"}


def _differences(mutant: str, biases: bool, integers: bool = False) -> dict[str, float]:
    p, ids, target = _data(biases, integers)
    summed = {"bo", "b2"} if mutant == "bias gradient of a row layer summed over devices" else set()
    model = partial(_sharded, mutant=mutant, softmax=not integers)
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    step = jax.shard_map(
        partial(_step, model, summed), mesh=mesh, in_specs=(SPECS, P(), P()), out_specs=((P(), P(), SPECS), SPECS),
        check_vma=False,
    )  # fmt: skip
    one, several = _whole_run(biases, integers), _run(jax.jit(step), p, ids, target)
    # A key's bias moves all scores of a query alike: its true gradient is zero, hence the common scale.
    scale = max(_norm(g) for g in one["gradients"].values()) * 1e-6
    gradients = [(g, several["gradients"][name]) for name, g in one["gradients"].items()]
    return {
        "loss": abs(float(one["loss"] - several["loss"]) / float(one["loss"])),
        "forward": _norm(one["output"] - several["output"]) / _norm(one["output"]),
        "gradients": max(_norm(a - b) / max(_norm(a), scale) for a, b in gradients),
        "later loss": abs(float(one["later"] - several["later"]) / float(one["later"])),
    }


@cache
def _whole_run(biases: bool, integers: bool) -> dict[str, Any]:
    step = partial(_step, partial(_whole, softmax=not integers), set())
    return _run(jax.jit(step), *_data(biases, integers))


def _run(step: Any, p: Params, ids: Array, target: Array) -> dict[str, Any]:
    """Loss, output and gradients of the first step, loss of the last."""
    (loss, output, gradients), p = step(p, ids, target)
    for _ in range(STEPS):
        (later, _, _), p = step(p, ids, target)
    return {"loss": loss, "output": np.asarray(output), "later": later,
            "gradients": {name: np.asarray(g) for name, g in gradients.items()}}  # fmt: skip


def _step(
    model: Any, summed: set[str], p: Params, ids: Array, target: Array
) -> tuple[tuple[Array, Array, Params], Params]:
    """Loss, output and gradients; parameters after a step of gradient descent."""

    def loss(p: Params) -> tuple[Array, Array]:
        out = model(p, ids)
        return ((out - target) ** 2).mean(), out

    (value, out), gradients = jax.value_and_grad(loss, has_aux=True)(p)
    gradients = {name: lax.psum(g, AXIS) if name in summed else g for name, g in gradients.items()}
    return (value, out, gradients), {name: p[name] - RATE * gradients[name] for name in p}


def _norm(x: Any) -> float:
    return float(np.linalg.norm(x))


def _data(biases: bool, integers: bool) -> tuple[Params, Array, Array]:
    rng = np.random.default_rng(0)

    def draw(name: str) -> np.ndarray:
        shape = SHAPES[name]
        if name[0] == "b" and not biases:
            return np.zeros(shape)
        if integers:
            return (rng.integers(-1, 2, shape) * (rng.random(shape) < 0.15)).astype(float)
        return rng.normal(size=shape) * (0.5 if name[0] == "b" else 0.2)

    p = {name: jnp.asarray(draw(name)) for name in SHAPES}
    ids = jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, LENGTH)))
    size = (BATCH, LENGTH, HIDDEN)
    return p, ids, jnp.asarray(rng.integers(-2, 3, size) if integers else rng.normal(size=size), jnp.float64)


def _attention(q: Array, k: Array, v: Array, softmax: bool) -> Array:
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k)
    shares = jax.nn.softmax(scores / WIDTH**0.5, -1) if softmax else scores
    return jnp.einsum("bnqk,bknd->bqnd", shares, v)


def _whole(p: Params, ids: Array, softmax: bool) -> Array:
    x = p["embedding"][ids]
    q, k, v = (jnp.einsum("bsh,hnd->bsnd", x, p[f"w{c}"]) + p[f"b{c}"] for c in "qkv")
    x = x + jnp.einsum("bsnd,ndh->bsh", _attention(q, k, v, softmax), p["wo"]) + p["bo"]
    return x + jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def _sharded(p: Params, ids: Array, mutant: str, softmax: bool) -> Array:
    """The same on a device's share of the parameters."""
    x = _embedding(p["embedding"], ids, mutant)
    x_in = _column_input(x, mutant)
    q, k, v = (jnp.einsum("bsh,hnd->bsnd", x_in, p[f"w{c}"]) + _column_bias(p[f"b{c}"], mutant) for c in "qkv")
    partial_sum = jnp.einsum("bsnd,ndh->bsh", _attention(q, k, v, softmax), p["wo"])
    x = x + _row_output(partial_sum, p["bo"], mutant)
    inner = jax.nn.relu(_column_input(x, mutant) @ p["w1"] + _column_bias(p["b1"], mutant))
    return x + _row_output(inner @ p["w2"], p["b2"], mutant)


def _embedding(rows: Array, ids: Array, mutant: str) -> Array:
    own = ids - lax.axis_index(AXIS) * rows.shape[0]
    here = (own >= 0) & (own < rows.shape[0])
    x = rows[jnp.where(here, own, 0)]
    if mutant != "vocabulary not masked":
        x = jnp.where(here[..., None], x, 0)
    return x if mutant == "embedding not summed" else summed_forward(x)


def _column_input(x: Array, mutant: str) -> Array:
    return x if mutant == "no sum in a column layer's backward" else summed_backward(x)


def _column_bias(bias: Array, mutant: str) -> Array:
    if mutant == "bias of a column layer not sharded":  # everybody adds the first device's share
        return lax.all_gather(bias, AXIS)[0]
    return bias


def _row_output(partial_sum: Array, bias: Array, mutant: str) -> Array:
    match mutant:
        case "bias of a row layer added before the sum":
            return summed_forward(partial_sum + bias)
        case "no sum in a row layer's forward":
            return partial_sum + bias
        case "sum in a row layer's backward, too":
            return summed_backward(summed_forward(partial_sum)) + bias
    return summed_forward(partial_sum) + bias
