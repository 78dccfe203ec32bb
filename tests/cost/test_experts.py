"""What a mixture of experts costs on paper, against what its steps really do and its models really hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

from patches.order import collectives
from tests.support.ranks import on_ranks
from tests.support.step_counts import check_step
from tpcheck.cli import main
from tpcheck.config.load import parse_run
from tpcheck.config.schema import RunConfig
from tpcheck.cost import formulas
from tpcheck.cost.memory import parameters, parameters_of_experts
from tpcheck.run.model import build_model, transformer_config
from tpcheck.run.train import enable_patches

EXPERTS = {"number": 8, "per_token": 2, "ffn_hidden_size": 40}
SHARED = {**EXPERTS, "shared_ffn_hidden_size": 48, "shared_gate": True, "router_dtype": "fp32"}
SMALL = {"preset": "qwen3-moe-tiny", "num_layers": 2, "hidden_size": 48, "head_dim": 8, "num_query_groups": 8}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"tp": 1},
    "ep": {"tp": 1, "dp": 4, "ep": 4},
    "tp": {"tp": 2, "ep": 2, "etp": 1},
    "etp": {"tp": 2, "ep": 1, "etp": 2, "recompute": True},
    "ep-etp": {"tp": 4, "ep": 2, "etp": 2},
}


def run(strategy: str, experts: dict[str, Any], **layout: Any) -> RunConfig:
    settings = {"seq_length": 16, "micro_batch_size": 2, "global_batch_size": 4 * layout.get("dp", 1)}
    free = {"batch": "order-free"} if strategy == "tree" else {}
    return parse_run(
        {"strategy": strategy, "model": {**SMALL, "experts": experts}, "sequence_parallel": layout["tp"] > 1}
        | settings | free | layout
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ("stock", "tree"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_does_what_the_formulas_say(layout, strategy):
    check_step(run(strategy, SHARED if layout in ("tp", "ep-etp") else EXPERTS, **LAYOUTS[layout]))


def test_a_step_whose_roots_are_large_does_what_the_formulas_say(monkeypatch):
    monkeypatch.setattr(collectives, "SMALL", 0)
    monkeypatch.setattr(formulas, "SMALL_ROOT", 0)
    check_step(run("tree", EXPERTS, **LAYOUTS["etp"]))


def held(config: RunConfig) -> tuple[int, int]:
    """Parameters of this rank's dense layers but norms, and of its experts."""
    enable_patches(config)
    parallel_state.initialize_model_parallel(
        config.tp, expert_model_parallel_size=config.ep, expert_tensor_parallel_size=config.etp
    )
    pieces, _ = build_model(config, transformer_config(config))
    named = [(name, parameter.numel()) for name, parameter in pieces[0].named_parameters() if parameter.dim() > 1]
    return tuple(sum(n for name, n in named if (".experts." in name) is which) for which in (False, True))


@pytest.mark.parametrize("layout", ("one", "ep", "tp", "ep-etp"))
def test_models_have_the_parameters_that_memory_is_counted_of(layout):
    config = run("stock", {**SHARED, "shared_gate": False}, **LAYOUTS[layout])
    for dense, of_experts in on_ranks(config.world_size, held, config):
        assert (dense, of_experts) == (parameters(config), parameters_of_experts(config))


def test_parameters_of_the_presets_are_those_of_their_name():
    config = parse_run({"model": "qwen3-30b-a3b", "strategy": "stock"})
    assert parameters(config) + parameters_of_experts(config) == pytest.approx(30.5e9, rel=0.01)


def test_command_counts_stock_and_tree(tmp_path: Path, capsys: Any) -> None:
    assert main(["cost", "qwen3-30b-a3b", "--tp", "2", "--ep", "8", "--etp", "1"]) == 0
    text = capsys.readouterr().out
    assert "TP=2, EP=8, ETP=1, sequence parallelism on" in text and "in the TP, EP and ETP groups" in text
    assert "gather     tree" not in text and "2·n·L·(m-1)/m·a·T/t·h·e" in text and "E=128 experts" in text
    assert max(map(len, text.splitlines())) <= 120
    path = tmp_path / "run.yaml"
    path.write_text("model: {preset: qwen3-moe-tiny}\ndp: 2\nep: 2\n")
    assert main(["cost", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["totals"].keys() == {"stock", "tree"}
    assert (answer["symbols"]["m"], answer["symbols"]["f"]) == (2, 0)


def test_layouts_that_cannot_be_are_refused(capsys: Any) -> None:
    assert main(["cost", "qwen3-30b-a3b", "--ep", "3"]) == 2
    assert "ep=3 does not divide experts.number=128" in capsys.readouterr().err
    assert main(["cost", "qwen3-8b", "--ep", "2"]) == 2
    assert "the model has none" in capsys.readouterr().err
