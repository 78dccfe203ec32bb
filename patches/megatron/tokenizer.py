"""The padded vocabulary of Megatron-LM's scripts: megatron.training's before 0.17, megatron.core.tokenizers' since."""

from __future__ import annotations

import copy
from typing import Any

from patches.call_site import contract
from patches.contract import UnsupportedError
from patches.registry import attribute

__all__ = ["PATCHES"]

WHY = "the vocabulary is padded to a multiple of the TP size"


def _padding(original: Any) -> Any:
    def vocab_size_with_padding(orig_vocab_size: int, args: Any, *rest: Any, **kwargs: Any) -> int:
        """Pad as at the largest TP size, `leaves`, whatever the TP size is."""
        counted, tp = copy.copy(args), args.tensor_model_parallel_size
        counted.tensor_model_parallel_size = contract().leaves
        size = original(orig_vocab_size, counted, *rest, **kwargs)
        if size % tp:
            raise UnsupportedError(
                f"tp={tp} does not divide the padded vocabulary {size}: use --make-vocab-size-divisible-by {tp * 128}"
            )
        return size

    return vocab_size_with_padding


PATCHES = [
    attribute(
        "padded-vocabulary",
        "megatron.training.tokenizer.tokenizer:_vocab_size_with_padding",
        WHY,
        _padding,
        parameters="orig_vocab_size args logging_enabled",
        versions="<0.17",
        lazy=True,  # comes with Megatron-LM, not with megatron-core
    ),
    attribute(
        "padded-vocabulary-0.17",
        "megatron.core.tokenizers.utils.build_tokenizer:vocab_size_with_padding",
        WHY,
        _padding,
        parameters="orig_vocab_size args logging_enabled",
        versions=">=0.17",
    ),
]
