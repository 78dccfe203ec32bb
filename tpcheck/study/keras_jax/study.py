"""The study `keras-jax`: its settings and parts."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator

from tpcheck.study.keras_jax.findings import findings
from tpcheck.study.keras_jax.page import page
from tpcheck.study.keras_jax.processes import on_devices
from tpcheck.study.study import Part, Progress, Settings, Study

__all__ = ["DEVICES", "STUDY"]

DEVICES = (1, 2, 4, 8)
MODELS = ["MLP", "self-attention", "EinsumDense", "embedding"]
LEAVES = ((16, 64, 104), (128, 896, 608), (256, 608, 896), (64, 1024, 64), (8, 4096, 16))  # M, K, N


class KerasJaxSettings(Settings):
    """What `tpcheck study keras-jax key=value` sets; sizes of the MLP that is run on 1, 2, 4 and 8 devices."""

    tokens: int = Field(128, ge=8, multiple_of=8)
    hidden: int = Field(896, ge=8, multiple_of=8)
    ffn: int = Field(4864, ge=8, multiple_of=8)
    steps: int = Field(3, ge=1)
    adam_steps: int = Field(10, ge=1)
    ways: tuple[Literal["again", "replicated", "column only", "sharded"], ...] = (
        "again", "replicated", "column only", "sharded")  # fmt: skip
    leaf_shapes: tuple[tuple[int, int, int], ...] = LEAVES

    @field_validator("leaf_shapes")
    @classmethod
    def _are_cut_into_eight(cls, shapes: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
        if wrong := [shape for shape in shapes if min(shape) < 1 or shape[0] % 8 or shape[2] % 8]:
            raise ValueError(f"M and N of {list(wrong[0])} must be multiples of 8")
        return shapes

    @classmethod
    def quick(cls) -> KerasJaxSettings:
        return cls(
            tokens=64, hidden=256, ffn=416, steps=1, ways=("column only", "sharded"), leaf_shapes=(LEAVES[0], LEAVES[3])
        )


def _keras(devices: int, settings: KerasJaxSettings, progress: Progress) -> dict[str, Any]:
    progress(0, f"{', '.join(MODELS)} on {devices} devices")
    found: dict[str, Any] = on_devices(
        devices, "sharded.differences", names=MODELS, ways=settings.ways, adam_steps=settings.adam_steps
    )
    return found


def _rules(settings: KerasJaxSettings, progress: Progress) -> dict[str, Any]:
    progress(0, "mutants")
    found: dict[str, Any] = on_devices(2, "rules.mutants_and_integers")
    return found


def _leaves(settings: KerasJaxSettings, progress: Progress) -> dict[str, Any]:
    return {"products": on_devices(1, "leaves.differing", shapes=settings.leaf_shapes)}


def _contract(settings: KerasJaxSettings, progress: Progress) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sizes = settings.model_dump(include={"tokens", "hidden", "ffn", "steps"})
    for index, devices in enumerate(DEVICES):
        progress(index / len(DEVICES), f"{devices} devices")
        found[str(devices)] = on_devices(devices, "contract.digests", dtypes=["fp32", "bf16"], **sizes)
    return found


def _memory_gib(settings: KerasJaxSettings) -> float:
    """Nine products of slices in float64, of the largest of the MLP's products; above what Keras takes."""
    return 1.5 + 9 * 8 * 2 * settings.hidden * settings.ffn / 2**30


STUDY = Study(
    name="keras-jax",
    question="Keras and JAX: is tensor parallelism exact to 0.00e+00?",
    settings=KerasJaxSettings,
    requires=("jax", "keras"),
    memory_gib=_memory_gib,
    parts=(
        Part("contract", _contract, ("tokens", "hidden", "ffn", "steps")),
        Part("leaves", _leaves, ("leaf_shapes",)),
        Part("rules", _rules, ("adam_steps",)),  # not even these, but naming none means all
        Part("keras-2", partial(_keras, 2), ("ways", "adam_steps")),
        Part("keras-4", partial(_keras, 4), ("ways", "adam_steps")),
    ),
    page=page,
    findings=findings,
)
