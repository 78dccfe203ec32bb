"""Four Keras models, and how each is spread over devices: column, row, column, row."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

__all__ = ["BUILD", "LAYOUTS", "data", "is_reduced"]

MODEL = "model"  # the mesh's axis
COLUMN, ROW, BIAS = (None, MODEL), (MODEL, None), (MODEL,)
HEADS_IN, HEADS_OUT, HEADS_BIAS = (None, MODEL, None), (MODEL, None, None), (MODEL, None)

LAYOUTS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "MLP": {"d1/kernel": COLUMN, "d1/bias": BIAS, "d2/kernel": ROW, "d3/kernel": COLUMN, "d3/bias": BIAS,
            "out/kernel": ROW},
    "self-attention": {
        "mha/(query|key|value)/kernel": HEADS_IN, "mha/(query|key|value)/bias": HEADS_BIAS,
        "mha/attention_output/kernel": HEADS_OUT, "f1/kernel": COLUMN, "f1/bias": BIAS, "f2/kernel": ROW},
    "EinsumDense": {"e1/kernel": COLUMN, "e1/bias": BIAS, "e2/kernel": ROW, "e3/kernel": COLUMN, "e3/bias": BIAS},
    "embedding": {"emb/embeddings": ROW, "d1/kernel": COLUMN, "d1/bias": BIAS, "out/kernel": ROW},
}  # fmt: skip


def is_reduced(name: str, layout: tuple[str | None, ...]) -> bool:
    """Whether a parameter's dimension that is spread is one that the layer sums over."""
    return layout in (ROW, HEADS_OUT) and not name.endswith("bias")


def _mlp() -> Any:
    x = i = keras.Input((64,))
    for name, width in (("d1", 128), ("d2", 256), ("d3", 128)):
        x = layers.Dense(width, activation="relu", name=name)(x)
    return keras.Model(i, layers.Dense(32, name="out")(x))


def _attention() -> Any:
    i = keras.Input((32, 64))
    x = layers.LayerNormalization(name="ln1")(i + layers.MultiHeadAttention(8, 8, name="mha")(i, i))
    f = layers.Dense(64, name="f2")(layers.Dense(256, activation="relu", name="f1")(x))
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization(name="ln2")(x + f))
    return keras.Model(i, layers.Dense(16, name="out")(x))


def _einsum() -> Any:
    x = i = keras.Input((48,))
    for name, width in (("e1", 96), ("e2", 64), ("e3", 24)):
        activation = None if name == "e3" else "relu"
        x = layers.EinsumDense("bi,io->bo", width, bias_axes="o", activation=activation, name=name)(x)
    return keras.Model(i, x)


def _embedding() -> Any:
    i = keras.Input((16,), dtype="int32")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(1000, 64, name="emb")(i))
    return keras.Model(i, layers.Dense(5, name="out")(layers.Dense(32, activation="relu", name="d1")(x)))


BUILD = {"MLP": _mlp, "self-attention": _attention, "EinsumDense": _einsum, "embedding": _embedding}


def data(name: str) -> tuple[Any, Any]:
    """A batch: inputs and targets."""
    rng = np.random.default_rng(42)
    if name == "embedding":
        return rng.integers(0, 1000, (8, 16)).astype("int32"), rng.integers(0, 5, (8,)).astype("int32")
    inputs, targets = {"MLP": ((32, 64), (32, 32)), "self-attention": ((16, 32, 64), (16, 16)),
                       "EinsumDense": ((24, 48), (24, 24))}[name]  # fmt: skip
    return rng.normal(size=inputs).astype("float32"), rng.normal(size=targets).astype("float32")
