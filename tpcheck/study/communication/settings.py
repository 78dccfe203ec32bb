"""What `tpcheck study communication` may be asked for."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from tpcheck.config.load import parse_run
from tpcheck.config.schema import RunConfig
from tpcheck.cost.memory import memory
from tpcheck.study.study import Settings

__all__ = ["SIZES", "Communication"]

SIZES = (1, 2, 4, 8)


class Communication(Settings):
    """GPT-2's shape, and a smaller one of its kind that is trained."""

    layers: int = Field(12, gt=1)
    hidden: int = Field(768, gt=0)
    vocabulary: int = Field(50304, gt=0)
    seq_length: int = Field(1024, gt=0)
    seeds: int = Field(4, gt=1)  # of initial weights
    repeats: int = Field(30, gt=0)  # of a collective that is timed
    trained_layers: int = Field(8, gt=1)
    trained_hidden: int = Field(256, gt=0)
    trained_length: int = Field(128, gt=0)
    batch: int = Field(16, gt=0)
    steps: int = Field(400, gt=0)

    @model_validator(mode="after")
    def _can_be_cut(self) -> Self:
        for tp in SIZES:
            self.run(tp, sequence_parallel=tp > 1)
            self.trained(tp)
        return self

    @classmethod
    def quick(cls) -> Self:
        return cls(layers=3, hidden=192, vocabulary=2048, seq_length=128, seeds=2, repeats=5, trained_layers=4,
                   trained_hidden=64, trained_length=64, batch=8, steps=60)  # fmt: skip

    def run(self, tp: int = 1, **changes: Any) -> RunConfig:
        """One step of GPT-2 on `tp` ranks. TP=8 does not divide 12 heads: there it has 16, as wide together."""
        heads = 16 if tp == 8 else 12
        model = {
            "preset": "gpt2-124m", "num_layers": self.layers, "hidden_size": self.hidden, "num_attention_heads": heads,
            "num_query_groups": heads, "head_dim": self.hidden // heads, "ffn_hidden_size": 4 * self.hidden,
            "vocab_size": self.vocabulary, "max_positions": self.seq_length, **changes.pop("model", {}),
        }  # fmt: skip
        given = {"strategy": "stock", "layers": "local", "micro_batch_size": 1, "global_batch_size": 1}
        return parse_run({"model": model, "tp": tp, "seq_length": self.seq_length, **given, **changes}, "communication")

    def trained(self, tp: int = 1, **changes: Any) -> RunConfig:
        """The model that is trained, on text."""
        model = {"num_layers": self.trained_layers, "hidden_size": self.trained_hidden, "num_attention_heads": 8,
                 "num_query_groups": 8, "head_dim": self.trained_hidden // 8, "vocab_size": 257,
                 "ffn_hidden_size": 4 * self.trained_hidden, "max_positions": self.trained_length}  # fmt: skip
        given = {"seq_length": self.trained_length, "micro_batch_size": self.batch, "global_batch_size": self.batch,
                 "steps": self.steps, "optimizer": {"warmup_steps": self.steps // 20}}  # fmt: skip
        return self.run(tp, model=model, **{**given, **changes})

    def gib(self) -> float:
        """Eight ranks share a model, but each has its own libraries and logits of its own vocabulary."""
        at_eight = 8 * memory(self.run(8), on_gpu=False).likely
        logits = 4 * 4 * self.seq_length * self.vocabulary / 2**30  # of the initial loss, in float32
        return max(at_eight, logits + 1.5)
