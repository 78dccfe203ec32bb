"""Keras models on one device and spread over several by `keras.distribution`, from the same weights."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import jax
import keras
import numpy as np
from keras import distribution

from tpcheck.study.keras_jax.hlo import collectives
from tpcheck.study.keras_jax.models import BUILD, LAYOUTS, MODEL, data, is_reduced

__all__ = ["differences"]

Layout = dict[str, tuple[str | None, ...]]


def differences(names: list[str], ways: list[str], adam_steps: int) -> dict[str, Any]:
    """Per model: differences of each way of running it, of `WAYS`, from one device, local shapes, collectives.

    Biases are random in all of them: Keras starts from zeros, which hide mistakes.
    """
    found = {}
    for name in names:
        one = _run(name, None, None, adam_steps)
        found[name] = {
            "tensors": len(one["weights"]),
            "loss": one["loss"],
            "largest output": float(np.abs(one["output"]).max()),
            **{way: _against(one, _run(name, _rules(name, way), one["weights"], adam_steps)) for way in ways},
        }
    return found


def _rules(name: str, way: str) -> Layout | None:
    rules = LAYOUTS[name]
    match way:
        case "again":
            return None
        case "replicated":
            return {}
        case "column only":
            return {key: layout for key, layout in rules.items() if not is_reduced(key, layout)}
    return rules


def _against(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    forward = np.abs(one["output"] - other["output"])
    found: dict[str, Any] = {
        "forward max": float(forward.max()),
        "forward mean": float(forward.mean()),
        "loss": abs(one["loss"] - other["loss"]),
        "local": other["local"],
        "collectives": other["collectives"],
    }
    for after in ("1 SGD step", "Adam steps"):
        worst = [float(np.abs(a - b).max()) for a, b in zip(one[after], other[after], strict=True)]
        found[after] = {"max": max(worst), "tensors": sum(value > 0 for value in worst)}
    return found


def _run(name: str, rules: Layout | None, weights: Any, adam_steps: int) -> dict[str, Any]:
    keras.utils.set_random_seed(42)
    keras.backend.clear_session()
    mesh = distribution.DeviceMesh((1, jax.device_count()), ["batch", MODEL], distribution.list_devices("cpu"))
    layouts = distribution.LayoutMap(mesh)
    for key, layout in (rules or {}).items():
        layouts[key] = layout
    parallel = distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    x, y = data(name)
    with parallel.scope() if rules is not None else contextlib.nullcontext():
        model = BUILD[name]()
        start = weights or _random_biases(model)
        model.set_weights(start)
        assert all(np.array_equal(a, b) for a, b in zip(start, model.get_weights(), strict=True))
        loss = keras.losses.SparseCategoricalCrossentropy(True) if y.ndim == 1 else keras.losses.MeanSquaredError()
        local = {v.path: list(v.value.addressable_shards[0].data.shape) for v in model.trainable_variables}
        if rules is not None:
            _check(local, model, rules)
        found = {
            "weights": start,
            "output": np.array(model.predict(x, batch_size=len(x), verbose=0)),
            "local": {path: [list(v.shape), local[path]] for v in model.trainable_variables for path in [v.path]},
            "collectives": _collectives(model, loss, x, y),
        }
        for key, optimizer, steps in (
            ("1 SGD step", keras.optimizers.SGD(0.1), 1),
            ("Adam steps", keras.optimizers.Adam(1e-3), adam_steps),
        ):
            model.set_weights(start)
            model.compile(optimizer, loss=loss)
            losses = [float(model.train_on_batch(x, y)) for _ in range(steps)]
            found.setdefault("loss", losses[0])
            found[key] = [np.array(v) for v in model.get_weights()]
    return found


def _random_biases(model: Any) -> list[Any]:
    rng = np.random.default_rng(7)
    return [
        (rng.normal(size=v.shape) * 0.5).astype("float32") if v.path.endswith("bias") else np.array(v)
        for v in model.weights
    ]


def _check(local: dict[str, list[int]], model: Any, rules: Layout) -> None:
    """Every parameter's local shape is what the layout says: whole, but divided where the axis stands."""
    for variable in model.trainable_variables:
        layout = next((lay for key, lay in rules.items() if re.search(key, variable.path)), ())
        sides = zip(variable.shape, [*layout, *[None] * (len(variable.shape) - len(layout))], strict=True)
        expected = [size // jax.device_count() if axis else size for size, axis in sides]
        if local[variable.path] != expected:
            raise AssertionError(f"{variable.path}: {local[variable.path]} on a device, not {expected}")


def _collectives(model: Any, loss: Any, x: Any, y: Any) -> dict[str, list[list[str]]]:
    """Of the compiled forward, and of forward and backward, whose gradients lie as the weights do."""
    weights, others = ([v.value for v in v_] for v_ in (model.trainable_variables, model.non_trainable_variables))

    def forward(weights: Any, x: Any) -> Any:
        return model.stateless_call(weights, others, x)[0]

    gradient = jax.grad(lambda weights, x, y: loss(y, forward(weights, x)))
    lies = [v.sharding for v in weights]
    return {
        "forward": collectives(jax.jit(forward).lower(weights, x).compile().as_text()),
        "both": collectives(jax.jit(gradient, out_shardings=lies).lower(weights, x, y).compile().as_text()),
    }
