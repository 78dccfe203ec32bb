"""What `tpcheck study frameworks` finds: which bits are equal, what losses cannot see, what bends a curve."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.studies import by_claim, check_page, run_quick
from tpcheck.cli import main
from tpcheck.study.frameworks import STUDY
from tpcheck.study.frameworks.findings import differing, distance, findings
from tpcheck.study.frameworks.names import from_hugging_face
from tpcheck.study.frameworks.trainings import losses_apart, trainings
from tpcheck.study.study import Results

INSTALLED = find_spec("transformers") and find_spec("deepspeed")
pytestmark = pytest.mark.timeout(1800)
FOLDER: dict[str, Path] = {}
GRAD = "gradients of parameters"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    if not INSTALLED:
        pytest.skip("transformers and DeepSpeed are not installed")
    FOLDER["out"] = tmp_path_factory.mktemp("study") / "out"
    return run_quick(STUDY, FOLDER["out"])


def test_autotp_and_dtensor_have_equal_bits_only_while_biases_are_zero(results: Results) -> None:
    step = results["one-step-bf16"]
    assert differing(step["zero biases"], "AutoTP", "FSDP2 + DTensor") == (0, 72)
    assert differing(step["random biases"], "AutoTP", "FSDP2 + DTensor")[0] > 50
    same_bits = by_claim(findings(results), "DTensor compute the same bits")
    assert same_bits.verdict.startswith("holds only if q, k and v biases are zero")


@pytest.mark.parametrize("biases", ["zero biases", "random biases"])
def test_in_float32_every_framework_is_rounding_away_from_ddp(results: Results, biases: str) -> None:
    step = results["one-step-fp32"][biases]
    for pair in step["pairs"]:
        for kind, found in pair["distances"].items():
            # Two layers of sums of at most 160 products; a key's bias has a gradient that nearly cancels.
            assert found["error"] < 160 * 2.0**-24 * 20, (pair["a"], pair["b"], kind, found["worst"])
            assert found["tensors"] >= 9 and not found["unequal replicas"]


@pytest.mark.parametrize("part", ["one-step-bf16", "one-step-fp32"])
@pytest.mark.parametrize("biases", ["zero biases", "random biases"])
def test_patched_megatron_has_the_same_bits_at_tp_1_and_2_and_stock_does_not(
    results: Results, part: str, biases: str
) -> None:
    step = results[part][biases]
    assert differing(step, "Megatron tree, TP=1", "Megatron tree, TP=2") == (0, 70)
    assert differing(step, "Megatron stock, TP=1", "Megatron stock, TP=2")[0] > 30
    assert step["runs"]["Megatron tree, TP=1"]["losses"] == step["runs"]["Megatron tree, TP=2"]["losses"]


def test_losses_of_all_ranks_do_not_see_that_gradients_are_not_added_up(results: Results) -> None:
    step = results["two-data-ranks"]
    right, wrong = (step["runs"][name]["losses"] for name in ("FSDP2 + DTensor", "DTensor without gradient sync"))
    assert right == wrong and right[0] != right[1]
    found = distance(step, "FSDP2 + DTensor", "DTensor without gradient sync")
    assert found["outputs"]["differing"] == []
    assert found[GRAD]["error"] > 0.3 and len(found[GRAD]["unequal replicas"]) == found[GRAD]["tensors"] == 26
    for pair in step["pairs"][:-1]:
        assert not pair["distances"][GRAD]["unequal replicas"], pair["b"]
    assert by_claim(findings(results), "every data-parallel rank").verdict == "does not hold"


def test_a_curve_follows_from_the_precision_of_weights_more_than_from_the_framework(results: Results) -> None:
    runs = trainings(results)
    assert runs["DDP, float32 master"]["moved"] > 0.99 > 0.5 > runs["DDP, bf16"]["moved"]
    apart = max(losses_apart(runs["AutoTP, float32 master"], runs["DDP, float32 master"]))
    assert max(losses_apart(runs["DDP, float32 master"], runs["DDP, bf16"])) > apart
    assert by_claim(findings(results), "bfloat16 on all sides").verdict == "does not hold"


def test_a_wrong_clip_has_too_large_a_norm_and_nearly_the_same_curve(results: Results) -> None:
    right, wrong = (trainings(results)[f"FSDP2 + DTensor, bf16{what}"] for what in ("", ", wrong clip"))
    assert 1.02 < wrong["norms"][0] / right["norms"][0] < 2**0.5
    assert right["norms"][0] == pytest.approx(trainings(results)["DDP, bf16"]["norms"][0], rel=1e-2)  # bfloat16
    assert max(losses_apart(right, wrong)) < 0.01
    assert by_claim(findings(results), "wrongly scoped clip").verdict != "holds"


def test_patched_megatron_has_one_curve(results: Results) -> None:
    runs = trainings(results)
    assert runs["Megatron tree, TP=1"]["losses"] == runs["Megatron tree, TP=2"]["losses"]
    assert runs["Megatron tree, TP=1"]["norms"] == runs["Megatron tree, TP=2"]["norms"]
    assert max(losses_apart(runs["Megatron stock, TP=1"], runs["Megatron stock, TP=2"])) > 0


def test_the_page_shows_it(results: Results, tmp_path: Path) -> None:
    check_page(STUDY, FOLDER["out"], 1, tmp_path)


@pytest.mark.skipif(not INSTALLED, reason="transformers and DeepSpeed are not installed")
@pytest.mark.parametrize(("override", "message"), [
    ("vocabulary=2000000000", "GiB of memory"),
    ("heads=5", "heads=5 must divide half of hidden_size=896"),
    ("kv_heads=4", "kv_heads=4 must be even and divide heads=14"),
])  # fmt: skip
def test_shapes_that_cannot_be_run_are_one_line(override: str, message: str, capsys: Any, tmp_path: Path) -> None:
    assert main(["study", "frameworks", override, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.skipif(bool(INSTALLED), reason="transformers and DeepSpeed are installed")
def test_missing_packages_are_one_line(capsys: Any, tmp_path: Path) -> None:
    assert main(["study", "frameworks", "--quick", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "frameworks needs transformers, deepspeed: pip install 'tpcheck[studies]'" in said and said.count("\n") == 1


def test_megatron_keeps_q_k_and_v_group_by_group() -> None:
    sizes = {"num_key_value_heads": 2}
    parts = {"q": np.arange(8), "k": np.arange(100, 104), "v": np.arange(200, 204)}
    given = {f"model.layers.1.self_attn.{name}_proj.bias": part for name, part in parts.items()}
    found = from_hugging_face(
        "decoder.layers.1.self_attention.linear_qkv.bias", given.__getitem__, sizes, np.concatenate
    )
    assert found.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
