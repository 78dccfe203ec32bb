"""The vocabulary is padded to one size at every TP, by whatever pads it and whenever that is imported."""

from __future__ import annotations

import importlib
import sys
import types
from types import SimpleNamespace

import pytest

import patches
from tests.support import STAND_IN
from tests.support.ranks import on_ranks

TOKENIZER = "megatron.training.tokenizer.tokenizer"


def padded_vocabularies(package: str, early: bool) -> dict[str, list[int]]:
    def sizes() -> list[int]:
        args = [SimpleNamespace(make_vocab_size_divisible_by=128, tensor_model_parallel_size=tp) for tp in (1, 2, 4, 8)]
        return [importlib.import_module(TOKENIZER)._vocab_size_with_padding(50257, a) for a in args]

    def state() -> str:
        return {row.name: row.state for row in patches.status()}["padded-vocabulary"]

    found = {}
    if early:
        sys.path.insert(0, package)
        found["stock"] = sizes()
    with patches.enabled():
        assert early or (state() == "waits for its import" and TOKENIZER not in sys.modules)
        sys.path.insert(0, package)
        found["patched"] = sizes()
        assert state() == "applied"
    found["afterwards"] = sizes()
    with patches.enabled("gather"), pytest.raises(patches.UnsupportedError, match="--make-vocab-size-divisible-by 384"):
        importlib.import_module(TOKENIZER)._vocab_size_with_padding(
            50257, SimpleNamespace(make_vocab_size_divisible_by=128, tensor_model_parallel_size=3)
        )
    return found


@pytest.mark.parametrize("early", (True, False), ids=("found before", "found after"))
def test_padded_vocabulary_does_not_depend_on_tp_whenever_megatrons_scripts_are_found(early):
    found = on_ranks(1, padded_vocabularies, str(STAND_IN), early)[0]
    assert set(found["patched"]) == {51200} and len(set(found["afterwards"])) > 1
    assert found.get("stock", found["afterwards"]) == found["afterwards"]


PADDING_BY_NUMBERS = """
def calculate_padded_vocab_size(vocab_size, make_vocab_size_divisible_by, tensor_model_parallel_size, log=True):
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
"""
PADDING_BY_CONFIG = """
def get_vocab_size(config, vocab_size, make_vocab_size_divisible_by=128):
    multiple = make_vocab_size_divisible_by * config.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
"""


def padded_by_a_builder(module: str, source: str, name: str) -> list[list[int]]:
    """Sizes at TP=1 to 8 that a module finds, which has imported the function by its name: patched, and afterwards."""

    sys.modules[module], sys.modules["builder"] = types.ModuleType(module), types.ModuleType("builder")
    exec(source, vars(sys.modules[module]))
    setattr(sys.modules["builder"], name, getattr(sys.modules[module], name))

    def sizes() -> list[int]:
        pad = getattr(sys.modules["builder"], name)
        if name == "get_vocab_size":
            return [pad(SimpleNamespace(tensor_model_parallel_size=tp), 50257) for tp in (1, 2, 4, 8)]
        return [pad(50257, 128, tp) for tp in (1, 2, 4, 8)]

    with patches.enabled():
        patched = sizes()
    return [patched, sizes()]


@pytest.mark.parametrize(
    ("module", "source", "name"),
    (
        ("megatron.bridge.utils.vocab_utils", PADDING_BY_NUMBERS, "calculate_padded_vocab_size"),
        ("nemo.lightning.base", PADDING_BY_CONFIG, "get_vocab_size"),
    ),
)
def test_vocabulary_that_a_model_builder_pads_does_not_depend_on_tp(module, source, name):
    patched, afterwards = on_ranks(1, padded_by_a_builder, module, source, name)[0]
    assert patched == [51200] * 4 and len(set(afterwards)) > 1
