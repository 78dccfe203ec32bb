"""What `tpcheck study tp-vs-dp` finds: which sums differ, which are equal, and which tolerance finds a bug."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.studies import by_claim, check_page, run_quick
from tpcheck.cli import main
from tpcheck.study.study import Results
from tpcheck.study.tp_vs_dp import STUDY
from tpcheck.study.tp_vs_dp.findings import derived_error, findings, ratios
from tpcheck.study.tp_vs_dp.layers import FEATURES, NO_SUM
from tpcheck.study.tp_vs_dp.roundings import bfloat16_sum, rounding_error

FOLDER: dict[str, Path] = {}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    FOLDER["out"] = tmp_path_factory.mktemp("study") / "out"
    return run_quick(STUDY, FOLDER["out"])


def rows(results: Results, dtype: str, **wanted: Any) -> list[dict[str, Any]]:
    found = results[f"isolated-{dtype}"]["layers"]
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def test_weights_are_the_same_only_where_every_rank_draws_all_of_them(results: Results) -> None:
    differing = results["weights"]["differing"]
    assert not any(differing["use_cpu_initialization=True"].values())
    for names in differing["use_cpu_initialization=False"].values():
        assert names and all("layernorm" not in name for name in names)
        assert "decoder.layers.0.mlp.linear_fc2.weight" in names and "embedding.word_embeddings.weight" in names
    assert "holds only if" in by_claim(findings(results), "Initial weights").verdict


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sums_over_ranks_differ_and_none_does_under_tree(results: Results, dtype: str) -> None:
    for row in rows(results, dtype, strategy="stock"):
        if (row["kind"], row["tensor"]) in (("row", "y"), ("column", "dx")):  # the two sums that TP cuts
            assert row["differing"] > row["size"] / 4, row
    under_tree = rows(results, dtype, strategy="tree")
    assert len(under_tree) == 18 and not any(row["differing"] or row["max_abs"] for row in under_tree)
    for kind in ("out", "dout"):
        assert not any(one[kind]["differing"] for one in results["stack"][f"tree {dtype}"])
    tree, stock = results[f"tree-{dtype}"], results[f"layers-{dtype}"]
    assert tree["verdict"] == "identical" and not tree["differing"] and tree["tensors"] == stock["tensors"]
    assert by_claim(findings(results), "price of tensor parallelism").verdict == "does not hold"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_first_difference_is_the_first_sum_over_ranks_and_all_is_rounding(results: Results, dtype: str) -> None:
    found = results[f"layers-{dtype}"]
    assert found["verdict"] == "rounding"
    assert found["first"] == {"name": "decoder.layers.0.self_attention.linear_proj", "kind": "out"}
    assert "decoder.layers.0.self_attention.linear_qkv" in found["equal_in_layer_0"]
    assert all(one[kind]["relative"] < one[kind]["limit"] for one in found["layers"] for kind in ("out", "dout"))


def test_the_error_grows_upwards_in_outputs_and_downwards_in_gradients(results: Results) -> None:
    outputs, gradients = ([one[kind]["relative"] for one in results["stack"]["stock bf16"]] for kind in ("out", "dout"))
    assert outputs == sorted(outputs) and gradients == sorted(gradients, reverse=True)
    layers = results["layers-bf16"]["layers"]
    assert layers[-1]["out"]["mean_abs"] > 3 * layers[0]["out"]["mean_abs"]
    assert layers[0]["dout"]["relative"] > 2 * layers[-1]["dout"]["relative"]


def test_float32_is_as_much_finer_as_its_precision_and_tf32_is_not(results: Results) -> None:
    found = ratios(results)
    assert 2**12 < found["model"] < 2**17 and 2**12 < found["pairs"] < 2**17
    assert found["pairs tf32"] < 2**7
    first, second = (one["out"]["mean_abs"] for one in results["stack"]["simulated tf32"][:2])
    assert second > 8 * first  # as in the analysis' "float32"
    assert by_claim(findings(results), "coarser").verdict == "does not hold"


def test_roundings_that_are_counted_are_those_that_are_measured(results: Results) -> None:
    for tp in (2, 4, 8):
        measured, derived = derived_error(results, tp)
        # Sums of bfloat16 numbers fall on few places between two of them, so that roundings are not quite uniform.
        assert measured == pytest.approx(derived, rel=0.1)
    assert by_claim(findings(results), "follows from counting").verdict == "holds"


def test_a_tolerance_on_outputs_lets_a_bug_pass_that_compare_names(results: Results) -> None:
    tried = {(one["dtype"], one["bug"]): one for one in results["bugs"]["tried"]}
    missing = tried["bf16", NO_SUM]
    assert missing["max_abs"] == results["layers-bf16"]["final"]["out"]["max_abs"] < 0.15
    assert missing["verdict"] == "suspect" and missing["kind"] == "dout"
    lost = tried["fp32", FEATURES]
    assert lost["verdict"] == "suspect" and lost["named"] == "decoder.layers.3.mlp.linear_fc2"
    assert by_claim(findings(results), "absolute tolerance").verdict == "does not hold"


def test_orders_are_many_in_stock_and_one_under_tree(results: Results) -> None:
    found = results["orders"]
    assert len(found["row-parallel stock"]) > 1 and len(found["row-parallel tree"]) == 1


def test_attention_that_ran_is_named(results: Results) -> None:
    lines = {line["name"]: line for line in results["machine"]["tree"]}
    assert lines["megatron local, patched"]["found"] == "each head by itself"
    assert any(line["section"] == "settings" for line in lines.values())


def test_page_is_whole(results: Results, tmp_path: Path) -> None:
    check_page(STUDY, FOLDER["out"], pictures=5, scratch=tmp_path)


@pytest.mark.parametrize(("override", "message"), [
    ("heads=4", "tp=8 does not divide num_attention_heads=4"),
    ("ffn=100", "multiple of 8"), ("seq_length=0", "greater than 0"),
])  # fmt: skip
def test_shapes_that_cannot_be_cut_are_refused(override: str, message: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["study", "tp-vs-dp", override, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 4))
def test_the_rounding_error_is_that_of_normal_numbers(variance: float) -> None:
    x = torch.randn(1 << 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * math.sqrt(variance)
    measured = float(((x.bfloat16().double() - x) ** 2).mean())
    assert rounding_error(variance) == pytest.approx(measured, rel=0.05)  # of 65536 samples


def test_a_chain_of_additions_rounds_most() -> None:
    assert bfloat16_sum(2)["once"] == bfloat16_sum(2)["chain"] == bfloat16_sum(2)["pairs"]
    for tp in (4, 8):
        found = bfloat16_sum(tp)
        assert found["once"] < found["pairs"] < found["chain"]
