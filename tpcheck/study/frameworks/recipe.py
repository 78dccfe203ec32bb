"""What a run is: which framework, at which layout, in which precision, with which mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tpcheck.config.strategies import Strategy

__all__ = ["Framework", "Precision", "Ready", "Recipe", "tokens"]

Framework = Literal["ddp", "autotp", "fsdp", "megatron"]
Precision = Literal["fp32", "bf16", "master"]
Sizes = dict[str, int]


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        precision: "fp32"; "bf16", in which weights, gradients and Adam's state are bfloat16, too (Megatron keeps
            float32 ones all the same); "master", bfloat16 products on float32 weights.
        sizes: of the model, as `transformers.Qwen2Config` has them.
        biases: random ones in q, k and v; else zero, as Hugging Face draws them.
        strategy: of the patches, or "stock".
        wrong_clip: adds up squares over all ranks, so that tensors that all tensor-parallel ranks hold count tp times.
        no_sync: leaves out what would add up gradients over data-parallel ranks.
        batch, length: samples of a data-parallel rank, and their length.
    """

    framework: Framework
    sizes: Sizes
    tp: int = 1
    dp: int = 1
    precision: Precision = "bf16"
    biases: bool = True
    strategy: Strategy = "stock"
    clip: float = 0.0
    lr: float = 1e-5
    wrong_clip: bool = False
    no_sync: bool = False
    batch: int = 2
    length: int = 32

    @property
    def world(self) -> int:
        return self.tp * self.dp


@dataclass(frozen=True)
class Ready:
    """A model in a framework on this rank: what `tpcheck.trace` takes; a whole step: the rank's loss, the norm."""

    traced: Any
    step: Callable[[torch.Tensor], tuple[float, float]]


def tokens(recipe: Recipe, step: int, dp_rank: int) -> torch.Tensor:
    """A rank's samples [batch, length]: words are Zipf-distributed, so that there is something to learn."""
    batch, length, vocabulary = recipe.batch, recipe.length, recipe.sizes["vocab_size"]
    shares = 1 / torch.arange(1, vocabulary + 1).double() ** 1.2
    generator = torch.Generator().manual_seed(1000 * step + dp_rank)
    words = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))
    return words[torch.multinomial(shares, batch * length, replacement=True, generator=generator)].view(batch, length)
