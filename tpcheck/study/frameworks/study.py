"""The study `frameworks`: its settings and parts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from tpcheck.study.frameworks.findings import findings
from tpcheck.study.frameworks.page import page
from tpcheck.study.study import Part, Progress, Settings, Study

__all__ = ["STUDY"]

CLIP = {"clip": 1.0}
TP2 = {"tp": 2}
# Of all: the analysis' learning rate, and gradients clipped to norm 1.
TRAININGS: dict[str, dict[str, Any]] = {
    "DDP, bf16": {"framework": "ddp", "precision": "bf16", **CLIP},
    "AutoTP, bf16": {"framework": "autotp", "precision": "bf16", **TP2, **CLIP},
    "FSDP2 + DTensor, bf16": {"framework": "fsdp", "precision": "bf16", **TP2, **CLIP},
    "FSDP2 + DTensor, bf16, wrong clip": {"framework": "fsdp", "precision": "bf16", "wrong_clip": True, **TP2, **CLIP},
    "DDP, float32 master": {"framework": "ddp", "precision": "master", **CLIP},
    "AutoTP, float32 master": {"framework": "autotp", "precision": "master", **TP2, **CLIP},
    "FSDP2 + DTensor, float32 master": {"framework": "fsdp", "precision": "master", **TP2, **CLIP},
    "Megatron stock, TP=1": {"framework": "megatron", "precision": "master", **CLIP},
    "Megatron stock, TP=2": {"framework": "megatron", "precision": "master", **TP2, **CLIP},
    "Megatron tree, TP=1": {"framework": "megatron", "precision": "master", "strategy": "tree", **CLIP},
    "Megatron tree, TP=2": {"framework": "megatron", "precision": "master", "strategy": "tree", **TP2, **CLIP},
}  # fmt: skip
MEGATRON = {
    f"Megatron {strategy}, TP={tp}": {"framework": "megatron", "strategy": strategy, "tp": tp}
    for strategy in ("stock", "tree") for tp in (1, 2)
}  # fmt: skip
STEPS: dict[str, dict[str, Any]] = {
    "DDP": {"framework": "ddp"}, "AutoTP": {"framework": "autotp", **TP2},
    "FSDP2 + DTensor": {"framework": "fsdp", **TP2}, **MEGATRON,
}  # fmt: skip
PAIRS = [
    *(("DDP", name) for name in STEPS if name != "DDP"), ("AutoTP", "FSDP2 + DTensor"),
    ("Megatron stock, TP=1", "Megatron stock, TP=2"), ("Megatron tree, TP=1", "Megatron tree, TP=2"),
]  # fmt: skip


class FrameworksSettings(Settings):
    """What `tpcheck study frameworks key=value` sets: sizes of a model of Qwen2's kind with 2 layers; the defaults are
    Qwen2.5-0.5B's but for the vocabulary, which has 151936 words there."""

    hidden_size: int = Field(896, ge=8)
    intermediate_size: int = Field(4864, ge=8)
    heads: int = Field(14, ge=2)
    kv_heads: int = Field(2, ge=2)
    vocabulary: int = Field(4096, ge=64)
    length: int = Field(256, ge=8)
    training_length: int = Field(64, ge=8)
    batch: int = Field(2, ge=1)
    steps: int = Field(100, ge=2)
    short_steps: int = Field(20, ge=2)

    @classmethod
    def quick(cls) -> FrameworksSettings:
        return cls(
            hidden_size=64,
            intermediate_size=160,
            heads=4,
            vocabulary=512,
            length=32,
            training_length=32,
            steps=20,
            short_steps=8,
        )

    @model_validator(mode="after")
    def _are_shared_by_two_ranks(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"heads={self.heads} must divide half of hidden_size={self.hidden_size}")
        if self.heads % self.kv_heads or self.kv_heads % 2:
            raise ValueError(f"kv_heads={self.kv_heads} must be even and divide heads={self.heads}")
        if self.intermediate_size % 2 or self.vocabulary % 2:
            raise ValueError("intermediate_size and vocabulary must be even: two ranks share them")
        return self

    def sizes(self) -> dict[str, int]:
        """As `transformers.Qwen2Config` has them."""
        return {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
                "vocab_size": self.vocabulary}  # fmt: skip


MODEL = ("hidden_size", "intermediate_size", "heads", "kv_heads", "vocabulary", "batch")


def _one_step(precision: str, settings: FrameworksSettings, progress: Progress) -> dict[str, Any]:
    """One step of everything, with zero and with random biases."""
    common = {"precision": precision, "length": settings.length, "batch": settings.batch}
    found = {}
    for index, biases in enumerate((False, True)):
        runs = {name: {**common, "biases": biases, **one} for name, one in STEPS.items()}
        pairs = PAIRS
        if precision == "bf16" and biases:  # what is right: the same bfloat16 weights in float32
            runs["float32"] = {**common, "biases": biases, "framework": "ddp", "precision": "fp32"}
            pairs = [*PAIRS, ("float32", "DDP"), ("float32", "FSDP2 + DTensor")]
        key = "random biases" if biases else "zero biases"
        found[key] = _traced(settings, runs, pairs, partial(_half, progress, index))
    return found


def _half(progress: Progress, index: int, done: float, what: str) -> None:
    progress((index + done) / 2, what)


def _two_data_ranks(settings: FrameworksSettings, progress: Progress) -> dict[str, Any]:
    """One step at DP=2, and without the sum of gradients over data-parallel ranks."""
    common = {"length": settings.length, "batch": settings.batch, "dp": 2}
    runs = {name: {**common, **one} for name, one in STEPS.items()}
    runs["DTensor without gradient sync"] = {**runs["FSDP2 + DTensor"], "no_sync": True}
    pairs = [*PAIRS, ("FSDP2 + DTensor", "DTensor without gradient sync")]
    return _traced(settings, runs, pairs, progress)


def _traced(
    settings: FrameworksSettings,
    runs: dict[str, dict[str, Any]],
    pairs: list[tuple[str, str]],
    progress: Callable[[float, str], None],
) -> dict[str, Any]:
    # What is not needed to refuse bad input is imported here: Megatron, transformers and DeepSpeed take seconds.
    from tpcheck.study.frameworks.compare import distances, norms
    from tpcheck.study.frameworks.recipe import Recipe
    from tpcheck.study.frameworks.runs import import_once, traced_step

    import_once()
    sizes, found = settings.sizes(), {}
    with tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch:
        paths = {name: Path(scratch, str(index)) for index, name in enumerate(runs)}
        for index, (name, run) in enumerate(runs.items()):
            progress(index / len(runs), name)
            losses = traced_step(Recipe(sizes=sizes, **run), paths[name])
            found[name] = {"losses": losses, "norms": norms(paths[name])}
        compared = [{"a": a, "b": b, "distances": distances(paths[a], paths[b], sizes)} for a, b in pairs]
    return {"runs": found, "pairs": compared}


def _training(name: str, settings: FrameworksSettings, progress: Progress) -> dict[str, Any]:
    from tpcheck.study.frameworks.recipe import Recipe
    from tpcheck.study.frameworks.runs import import_once, training

    import_once()
    steps = getattr(settings, _steps(name))
    progress(0, f"{steps} steps")
    sizes: dict[str, Any] = {"batch": settings.batch, "length": settings.training_length, "sizes": settings.sizes()}
    return {"name": name, **training(Recipe(**sizes, **TRAININGS[name]), steps)}


def _steps(name: str) -> str:
    """The setting that says how many: few where one differing bit would show."""
    return "short_steps" if "tree" in name else "steps"


def _memory_gib(settings: FrameworksSettings) -> float:
    """Four ranks: weights, gradients, two of Adam's and float32 copies; logits and what their gradient takes."""
    layer = settings.hidden_size * (2 * settings.hidden_size + 4 * settings.hidden_size // settings.heads
                                    + 3 * settings.intermediate_size)  # fmt: skip
    parameters = settings.vocabulary * settings.hidden_size + 2 * layer
    logits = settings.batch * settings.length * settings.vocabulary
    return 4 * (0.6 + (20 * parameters + 16 * logits) / 2**30)


def _slug(name: str) -> str:
    return "training-" + "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-").replace("--", "-")


STUDY = Study(
    name="frameworks",
    question="Do DDP, DeepSpeed AutoTP, FSDP2 + DTensor and Megatron train the same model?",
    settings=FrameworksSettings,
    requires=("transformers", "deepspeed"),
    memory_gib=_memory_gib,
    parts=(
        Part("one-step-bf16", partial(_one_step, "bf16"), (*MODEL, "length")),
        Part("one-step-fp32", partial(_one_step, "fp32"), (*MODEL, "length")),
        Part("two-data-ranks", _two_data_ranks, (*MODEL, "length")),
        *(Part(_slug(name), partial(_training, name), (*MODEL, "training_length", _steps(name))) for name in TRAININGS),
    ),
    page=page,
    findings=findings,
)
