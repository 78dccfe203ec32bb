"""The cost on paper against what a step really does: products, bytes and buffers counted on gloo ranks."""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from patches.order import collectives
from tests.support.ranks import on_ranks
from tests.support.step_counts import check_step, counted
from tpcheck.cli import main
from tpcheck.config.load import parse_run
from tpcheck.config.presets import PRESETS
from tpcheck.config.schema import RunConfig
from tpcheck.cost import formulas
from tpcheck.cost.measured import measured
from tpcheck.cost.memory import parameters
from tpcheck.cost.terms import LEGEND, STRATEGIES, step, symbols, total

QWEN3 = {"preset": "qwen3-tiny", "num_layers": 2, "hidden_size": 48, "head_dim": 8, "num_query_groups": 4,
         "ffn_hidden_size": 40}  # fmt: skip
SHARED_KV = {**QWEN3, "num_query_groups": 2}
GPT2 = {"preset": "gpt2-124m", "num_layers": 1, "hidden_size": 48, "head_dim": 4, "num_attention_heads": 8,
        "num_query_groups": 8, "ffn_hidden_size": 40, "vocab_size": 200, "max_positions": 32}  # fmt: skip
B8 = {"model": "qwen3-8b", "strategy": "stock", "seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 1}


def run(strategy: str, tp: int, sp: bool = False, **settings: Any) -> RunConfig:
    defaults = {"model": QWEN3, "seq_length": 16, "micro_batch_size": 2, "global_batch_size": 4}
    return parse_run(defaults | {"strategy": strategy, "tp": tp, "sequence_parallel": sp} | settings)


CASES: dict[str, dict[str, Any]] = {
    "tp1": {"tp": 1},
    "fp32": {"tp": 2, "dtype": "fp32"},
    "sp-recompute": {"tp": 4, "sp": True, "recompute": True},
    "gpt2": {"tp": 4, "model": GPT2},
    "gpt2-sp": {"tp": 4, "sp": True, "model": GPT2},
    "shared-kv": {"tp": 4, "model": SHARED_KV},
    "shared-kv-sp": {"tp": 4, "sp": True, "model": SHARED_KV},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_does_what_the_formulas_say(case, strategy):
    check_step(run(strategy, **case))


@pytest.mark.parametrize("strategy", ("gather", "tree"))
@pytest.mark.parametrize("model", (QWEN3, GPT2), ids=("qwen3", "gpt2"))
def test_a_step_does_what_the_formulas_say_where_the_batch_has_no_order(strategy, model):
    check_step(run(strategy, tp=4, sp=True, model=model, batch="order-free"))


@pytest.mark.parametrize(
    ("strategy", "layout"),
    (
        ("tree", {"tp": 1, "cp": 4, "recompute": True}),
        ("tree", {"tp": 2, "cp": 2, "sp": True}),
        ("gather", {"tp": 2, "cp": 2, "sp": True, "model": GPT2}),
    ),
)
def test_a_step_does_what_the_formulas_say_on_context_parallel_ranks(strategy, layout):
    """Of attention by blocks, products are not those of the formulas."""
    config = run(strategy, **layout, batch="order-free", chunks=8)
    account = step(config)
    for counts in on_ranks(config.world_size, counted, config):
        assert counts.bytes == pytest.approx(total(account, "bytes", strategy), abs=0.5)
        assert counts.buffers == total(account, "memory", strategy)


@pytest.mark.parametrize("sp", (False, True))
def test_a_step_whose_roots_are_large_does_what_the_formulas_say(sp, monkeypatch):
    monkeypatch.setattr(collectives, "SMALL", 0)
    monkeypatch.setattr(formulas, "SMALL_ROOT", 0)
    check_step(run("tree", tp=4, sp=sp, model=GPT2))


def test_a_root_is_as_small_as_the_patches_have_it() -> None:
    assert formulas.SMALL_ROOT == collectives.SMALL


def test_gather_multiplies_a_third_of_the_layers_products_on_every_rank() -> None:
    """The reference design's 3.3 times at TP=8: of a layer's three products one is a sharded sum."""
    terms = [term for term in step(parse_run(B8 | {"tp": 8})) if "attention" not in term.what]
    assert total(terms, "flops", "gather") / total(terms, "flops", "stock") == pytest.approx((2 + 8) / 3)
    assert total(terms, "flops", "tree") == total(terms, "flops", "stock")


def test_flops_of_a_step_are_those_of_six_per_parameter_and_token() -> None:
    terms = [term for term in step(parse_run(B8)) if "attention" not in term.what]
    multiplied = 8.19e9 - 151936 * 4096  # the embedding is looked up
    assert total(terms, "flops", "stock") == pytest.approx(6 * multiplied * 4096, rel=1e-3)


def test_every_symbol_of_a_formula_is_explained() -> None:
    parallel = {"batch": "order-free", "strategy": "tree", "chunks": 4, "cp": 2}
    experts = {"model": "qwen3-30b-a3b", "ep": 2, "dp": 2, "global_batch_size": 2}
    configs = [parse_run(B8 | more) for more in ({}, {"tp": 8}, parallel, experts)]
    texts = " ".join(term.formula for config in configs for term in step(config))
    assert set(re.findall(r"[^\W\d]", texts)) <= set(LEGEND) == set(symbols(configs[-1]))
    assert set(symbols(configs[0])) < set(LEGEND)


def test_command_prints_every_formula_and_what_it_gives(capsys: Any) -> None:
    assert main(["cost", "qwen3-8b", "--tp", "8", "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    for term in step(parse_run(B8 | {"tp": 8})):
        assert term.formula in text
    assert "datasheet" in text and "t=8" in text
    assert "NVLink joins" not in text


@pytest.mark.parametrize("tp", ("1", "16"))
def test_columns_stand_below_their_heading_within_120_columns(tp: str, capsys: Any) -> None:
    assert main(["cost", "qwen3-8b", "--tp", tp, "--sp"]) == 0
    text = capsys.readouterr().out
    headings = [line for line in text.splitlines() if "gather     tree" in line]
    assert len(headings) == 4 + ("at measured rates" in text) and len({line.index("tree") for line in headings}) == 1
    assert not any(unicodedata.combining(letter) for letter in text)
    assert max(map(len, text.splitlines())) <= 120
    assert ("NVLink joins the 8 GPUs of a board; between boards TP=16 is slower" in text) == (tp == "16")


def test_command_answers_in_json(capsys: Any) -> None:
    assert main(["cost", "qwen3-8b", "--tp", "8", "--gpu", "b200", "--seq", "2048", "--sp", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    config = parse_run(B8 | {"tp": 8, "seq_length": 2048, "sequence_parallel": True})
    assert answer["terms"] == [
        dataclasses.asdict(term) | {"strategies": list(term.strategies)} for term in step(config)
    ]
    tree = answer["totals"]["tree"]
    assert tree["flops"] == total(step(config), "flops", "tree")
    assert tree["flops_ms"] == pytest.approx(tree["flops"] / 2250e12 * 1e3)
    assert tree["bytes_ms"] == pytest.approx(tree["bytes"] / 900e9 * 1e3)


def test_gradients_without_an_order_take_four_bytes_more(tmp_path: Path, capsys: Any) -> None:
    assert main(["cost", "qwen3-8b", "--batch", "order-free", "--json"]) == 0
    free = json.loads(capsys.readouterr().out)["totals"]
    assert main(["cost", "qwen3-8b", "--json"]) == 0
    ordered = json.loads(capsys.readouterr().out)["totals"]
    assert free["stock"]["resident"] == ordered["stock"]["resident"]
    more = free["tree"]["resident"] - ordered["tree"]["resident"]
    assert more == pytest.approx(4 * parameters(parse_run(B8 | {"tp": 8})))
    path = tmp_path / "run.yaml"
    path.write_text("model: qwen3-8b\nbatch: order-free\n")
    assert main(["cost", str(path)]) == 0
    text = capsys.readouterr().out
    assert "gradients of 8 bytes instead of stock's 4" in text


def test_context_parallel_ranks_are_counted(capsys: Any) -> None:
    assert main(["cost", "qwen3-8b", "--tp", "2", "--cp", "4"]) == 0
    text = capsys.readouterr().out
    assert "TP=2, CP=4, sequence" in text and "in the TP and CP groups" in text and "CP, attention: all-to-all" in text
    assert main(["cost", "qwen3-8b", "--cp", "3"]) == 2
    assert "power of two" in capsys.readouterr().err


def test_stages_of_a_model_are_not_counted(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: qwen3-8b\npp: 2\n")
    assert main(["cost", str(path)]) == 2
    assert "a whole model's cost is counted, not that of pp=2 stages of one: use pp=1" in capsys.readouterr().err


def test_command_takes_a_run_file(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: qwen3-0.6b\ntp: 2\nrecompute: true\nseq_length: 1024\n")
    assert main(["cost", str(path), "--micro-batch", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["symbols"]
    assert (found["t"], found["r"], found["T"], found["n"]) == (2, 2, 1024, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen4"], f"qwen4: neither a preset ({', '.join(PRESETS)}) nor a run file"),
        (["qwen3-8b", "--tp", "3"], "num_attention_heads=32"),
        (["qwen3-8b", "--gpu", "v100"], "'v100' is not one of"),
    ],
)
def test_bad_input_is_answered_with_what_is_allowed(arguments, message, capsys):
    assert main(["cost", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_rates_that_a_gpu_was_measured_at_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(tp: int, leaves: int, ms: float, mm_ms: float) -> dict[str, float]:
        return {"tp": tp, "m": 1000, "k": 1000, "n": 1000, "leaves": leaves, "ms": ms, "mm_ms": mm_ms}

    folder = tmp_path / "results/gpu/nvidia-h100"
    folder.mkdir(parents=True)
    rows = [row(8, 1, 0.004, 0.002), row(8, 2, 0.006, 0.003), row(1, 8, 1.0, 1.0)]
    bench = {"format": 1, "versions": {"device": "NVIDIA H100 80GB HBM3"}, "products": rows}
    (folder / "bench.json").write_text(json.dumps(bench))
    monkeypatch.chdir(tmp_path)
    found = measured("h100", 8)
    assert found and found.tflops == pytest.approx({"stock": 800, "tree": 400, "gather": 500})
    assert measured("b300", 8) is None and measured("h100", 4) is None
    assert main(["cost", "qwen3-8b", "--tp", "8", "--gpu", "h100"]) == 0
    assert "measured on NVIDIA H100 80GB HBM3, " in capsys.readouterr().out
    (folder / "bench.json").write_text(json.dumps({**bench, "products": [{"tp": 8}]}))
    assert main(["cost", "qwen3-8b", "--tp", "8", "--gpu", "h100"]) == 2
    assert "not what `make gpu` writes" in capsys.readouterr().err
