"""The padded vocabulary: of Megatron-LM's scripts, megatron.training's before 0.17 and megatron.core.tokenizers' since;
of models that Megatron, Megatron Bridge or NeMo build from a config of their own.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from packaging.specifiers import SpecifierSet

from patches.call_site import contract
from patches.contract import Contract, UnsupportedError
from patches.registry import Patch, Undo, attribute

__all__ = ["PATCHES"]

WHY = "the vocabulary is padded to a multiple of the TP size"


def _padding(original: Any) -> Any:
    def vocab_size_with_padding(orig_vocab_size: int, args: Any, *rest: Any, **kwargs: Any) -> int:
        size = original(orig_vocab_size, _at_most_ranks(args), *rest, **kwargs)
        return _divisible(size, args.tensor_model_parallel_size)

    return vocab_size_with_padding


def _padding_by_numbers(original: Any) -> Any:
    def calculate_padded_vocab_size(
        vocab_size: int,
        make_vocab_size_divisible_by: int,
        tensor_model_parallel_size: int,
        *rest: Any,
        **kwargs: Any,
    ) -> int:
        size = original(vocab_size, make_vocab_size_divisible_by, contract().leaves, *rest, **kwargs)
        return _divisible(size, tensor_model_parallel_size)

    return calculate_padded_vocab_size


def _padding_by_config(original: Any) -> Any:
    def get_vocab_size(config: Any, *rest: Any, **kwargs: Any) -> int:
        return _divisible(original(_at_most_ranks(config), *rest, **kwargs), config.tensor_model_parallel_size)

    return get_vocab_size


def _at_most_ranks(settings: Any) -> Any:
    """The settings as at the largest TP size, `leaves`, whatever the TP size is."""
    counted = copy.copy(settings)
    counted.tensor_model_parallel_size = contract().leaves
    return counted


def _divisible(size: int, tp: int) -> int:
    if size % tp:
        raise UnsupportedError(
            f"tp={tp} does not divide the padded vocabulary {size}: use --make-vocab-size-divisible-by {tp * 128}"
        )
    return size


def _wherever_imported(name: str, target: str, replacement: Any, versions: str = "") -> Patch:
    """A patch of a function that other modules, imported before or after, hold under its own name."""
    module, _, attr = target.partition(":")

    def install(contract: Contract) -> Undo:
        original = getattr(sys.modules[module], attr, None)
        if original is None:
            raise UnsupportedError(f"{target} does not exist here: this version is not known to the patches")
        replaced = replacement(original)
        holders = [held for held in list(sys.modules.values()) if getattr(held, "__dict__", {}).get(attr) is original]
        for holder in holders:
            setattr(holder, attr, replaced)

        def undo() -> None:
            for holder in holders:
                setattr(holder, attr, original)

        return undo

    return Patch(name, target, WHY, install, SpecifierSet(versions), lazy=True)


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
    _wherever_imported(
        "padded-vocabulary-models",
        "megatron.training.vocab_utils:calculate_padded_vocab_size",
        _padding_by_numbers,
        ">=0.18",
    ),
    _wherever_imported(
        "padded-vocabulary-bridge",
        "megatron.bridge.utils.vocab_utils:calculate_padded_vocab_size",
        _padding_by_numbers,
    ),
    _wherever_imported("padded-vocabulary-nemo", "nemo.lightning.base:get_vocab_size", _padding_by_config),
]
