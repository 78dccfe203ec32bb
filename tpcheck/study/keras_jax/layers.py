"""Column- and row-parallel layers under `shard_map`: stock, and of the contract's `tree`.

    column   y_TtN = x_TK · w_KtN + b_tN        dx: sum over N, spread over devices; the rest is local
    row      y_TN  = Σ_r x_TtK · w_tKN + b_N    y: sum over K, spread over devices; the rest is local

`tree`: a spread dimension is cut into `LEAVES` leaves, each an exact product in float32; a device adds the subtree of
its own, devices add theirs in the same tree's order, and the root is rounded once. So 1, 2, 4 and 8 devices walk one
tree. Sums that are local are single leaves, and exact, or their kernel would be chosen by the local shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tpcheck.study.keras_jax.exact import exact_product, rounded, sum_of_pairs

__all__ = ["AXIS", "KINDS", "LEAVES", "Layers"]

AXIS = "tp"
LEAVES = 8


class Layers(NamedTuple):
    """`column(x_TK, w_KtN, b_tN)` and `row(x_TtK, w_tKN, b_N)`, differentiable."""

    column: Callable[[Array, Array, Array], Array]
    row: Callable[[Array, Array, Array], Array]


def _one_leaf(a: Array, b: Array) -> Array:
    return rounded(exact_product(a, b), a.dtype)


def _tree_product(a_MtK: Array, b_tKN: Array) -> Array:
    """Σ over devices of a·b, by the tree over `LEAVES` leaves of K, rounded once; on every device."""
    devices = lax.axis_size(AXIS)
    own = LEAVES // devices
    if a_MtK.shape[0] % devices or a_MtK.shape[1] % own:
        raise ValueError(f"{a_MtK.shape} on each of {devices} devices: {LEAVES} must divide both dimensions")
    a_LMK = jnp.swapaxes(a_MtK.reshape(a_MtK.shape[0], own, -1), 0, 1)
    root_MN = sum_of_pairs(exact_product(a_LMK, b_tKN.reshape(own, -1, b_tKN.shape[1])))
    if devices == 1:
        return rounded(root_MN, a_MtK.dtype)
    roots = lax.all_to_all(root_MN.reshape(devices, -1, root_MN.shape[1]), AXIS, 0, 0)
    return lax.all_gather(rounded(sum_of_pairs(roots), a_MtK.dtype), AXIS, tiled=True)


def _plus(y: Array, bias: Array) -> Array:
    return rounded(y.astype(jnp.float32) + bias.astype(jnp.float32), y.dtype)


def _sum_of_rows(dy_TN: Array) -> Array:
    return _one_leaf(jnp.ones((1, dy_TN.shape[0]), dy_TN.dtype), dy_TN)[0]


@jax.custom_vjp
def _tree_column(x: Array, w: Array, b: Array) -> Array:
    return _plus(_one_leaf(x, w), b)


def _tree_column_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array, Array]:
    x, w = kept
    return _tree_product(dy, w.T), _one_leaf(x.T, dy), _sum_of_rows(dy)


_tree_column.defvjp(lambda x, w, b: (_tree_column(x, w, b), (x, w)), _tree_column_backward)


@jax.custom_vjp
def _tree_row(x: Array, w: Array, b: Array) -> Array:
    return _plus(_tree_product(x, w), b)


def _tree_row_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array, Array]:
    x, w = kept
    return _one_leaf(dy, w.T), _one_leaf(x.T, dy), _sum_of_rows(dy)


_tree_row.defvjp(lambda x, w, b: (_tree_row(x, w, b), (x, w)), _tree_row_backward)


@jax.custom_vjp
def summed_backward(x: Array) -> Array:
    """Megatron's f: nothing forward, an all-reduce backward."""
    return x


summed_backward.defvjp(lambda x: (x, None), lambda _, dx: (lax.psum(dx, AXIS),))


@jax.custom_vjp
def summed_forward(x: Array) -> Array:
    """Megatron's g: an all-reduce forward, nothing backward."""
    return lax.psum(x, AXIS)


summed_forward.defvjp(lambda x: (lax.psum(x, AXIS), None), lambda _, dy: (dy,))


def _stock_column(x: Array, w: Array, b: Array) -> Array:
    return summed_backward(x) @ w + b


def _stock_row(x: Array, w: Array, b: Array) -> Array:
    return summed_forward(x @ w) + b


KINDS: dict[str, Layers] = {"stock": Layers(_stock_column, _stock_row), "tree": Layers(_tree_column, _tree_row)}


def mlp(kind: str, p: dict[str, Array], x_TK: Array) -> Array:
    """row(relu(column(x))): relu computes nothing, so that all rounding is in the layers."""
    layers = KINDS[kind]
    return layers.row(jax.nn.relu(layers.column(x_TK, p["w1"], p["b1"])), p["w2"], p["b2"])


def output_and_gradients(kind: str, p: dict[str, Array], x: Array, dy: Array) -> dict[str, Array]:
    """The output, its gradients for `dy` with respect to the input and every parameter."""
    y, backward = jax.vjp(partial(mlp, kind), p, x)
    dp, dx = backward(dy)
    return {"y": y, "dx": dx, **{f"d{name}": value for name, value in dp.items()}}


def trained(kind: str, steps: int, p: dict[str, Array], x: Array, target: Array) -> dict[str, Any]:
    """The parameters after `steps` of gradient descent on |y - target|²/2 with a rate of 2^-10."""
    for _ in range(steps):
        y, backward = jax.vjp(lambda p: mlp(kind, p, x), p)
        (dp,) = backward(rounded(y.astype(jnp.float32) - target.astype(jnp.float32), y.dtype))
        p = {n: rounded(v.astype(jnp.float32) - dp[n].astype(jnp.float32) * 2.0**-10, v.dtype) for n, v in p.items()}
    return p
