"""What `tpcheck study tp-vs-dp` may be asked for."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from tpcheck.config.load import parse_run
from tpcheck.config.schema import RunConfig
from tpcheck.study.study import Settings

__all__ = ["SIZES", "TpVsDp"]

SIZES = (1, 2, 4, 8)


class TpVsDp(Settings):
    """The shapes of the analysis, but for the length of a sequence in the model."""

    tokens: int = Field(8192, gt=0)  # of a layer in isolation: 4096 of two sequences
    hidden: int = Field(1024, gt=0)
    ffn: int = Field(4096, gt=0, multiple_of=8)
    stacked: int = Field(16, gt=1)
    stacked_tokens: int = Field(1024, gt=0)
    layers: int = Field(28, gt=1)
    heads: int = Field(16, gt=0)
    head_dim: int = Field(128, gt=0)
    model_ffn: int = Field(3072, gt=0)
    vocabulary: int = Field(2048, gt=0)
    seq_length: int = Field(256, gt=0)

    @model_validator(mode="after")
    def _can_be_cut(self) -> Self:
        self.run(tp=8)
        return self

    @classmethod
    def quick(cls) -> Self:
        return cls(
            tokens=256, stacked_tokens=32, hidden=256, ffn=1024, stacked=8, layers=6, heads=8, head_dim=32,
            model_ffn=768, vocabulary=512, seq_length=64,
        )  # fmt: skip

    def run(self, **changes: Any) -> RunConfig:
        """The model as a run of `tpcheck train` would have it."""
        model = {
            "preset": "qwen3-0.6b", "num_layers": self.layers, "hidden_size": self.hidden,
            "num_attention_heads": self.heads, "num_query_groups": self.heads // 2, "head_dim": self.head_dim,
            "ffn_hidden_size": self.model_ffn, "vocab_size": self.vocabulary,
        }  # fmt: skip
        given = {"strategy": "stock", "layers": "local", "micro_batch_size": 1, "global_batch_size": 1}
        return parse_run({"model": model, "seq_length": self.seq_length, **given, **changes}, "tp-vs-dp")

    def gib(self) -> float:
        """The larger of: the layers in isolation in float64, and the model's weights, gradients and activations."""
        isolated = 8 * 6 * self.tokens * (self.hidden + self.ffn)
        weights = 8 * self.hidden * 3 * (self.heads * self.head_dim + self.model_ffn)
        width = 4 * self.hidden + 8 * self.heads * self.head_dim + 6 * self.model_ffn + 3 * self.heads * self.seq_length
        model = self.layers * (weights + 4 * self.seq_length * width) + 32 * self.vocabulary * self.seq_length
        return max(isolated, model) / 2**30 + 1.5
