"""What `check` says of the patches' own settings, whose import a login shell is spared, is what `Contract` says."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from patches.contract import Attention, Batch, Contract, Strategy, UnsupportedError
from tpcheck.config.check import check
from tpcheck.config.load import validated
from tpcheck.config.schema import RunConfig
from tpcheck.config.strategies import STRATEGIES
from tpcheck.errors import TpcheckError

SIZES = (1, 2, 3, 4, 6, 8, 16)  # each divides the model's and the sequence's
RUN: dict[str, Any] = {
    "model": {"preset": "qwen3-tiny", "num_attention_heads": 48, "num_query_groups": 48, "ffn_hidden_size": 480},
    "seq_length": 96,
}
CHOICES = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(("tree", "gather")),
        "leaves": st.sampled_from(SIZES),
        "tp": st.sampled_from(SIZES),
        "batch": st.sampled_from((None, "order-free")),
        "chunks": st.sampled_from(SIZES),
        "cp": st.sampled_from(SIZES),
        "attention": st.sampled_from((None, "blockwise", "unfused")),
    }
)


def contract_takes(config: RunConfig) -> bool:
    try:
        contract = Contract(
            config.strategy,  # type: ignore[arg-type]  # not stock
            config.leaves,
            config.attention_on(gpu=False),  # type: ignore[arg-type]
            batch=config.batch or "ordered",
            chunks=config.chunks,
        )
        contract.leaves_of_rank(config.tp)
        contract.chunks_of_rank(config.cp)
    except (ValueError, UnsupportedError):
        return False
    return True


def check_takes(config: RunConfig) -> bool:
    try:
        check(config)
    except TpcheckError:
        return False
    return True


@given(CHOICES)
@settings(max_examples=300, deadline=None)
def test_check_refuses_what_the_contract_refuses_and_nothing_else(choices: dict[str, Any]) -> None:
    config = validated(RunConfig, {**RUN, **choices}, "run")
    assert check_takes(config) == contract_takes(config)


def test_run_files_have_the_contracts_words() -> None:
    attention, batch = (get_args(RunConfig.model_fields[key].annotation)[0] for key in ("attention", "batch"))
    assert get_args(attention) == get_args(Attention)
    assert {"ordered", *get_args(batch)} == set(get_args(Batch))  # null is in order
    assert {*STRATEGIES} == {"stock", *get_args(Strategy)}
