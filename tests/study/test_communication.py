"""What `tpcheck study communication` finds: what is sent, what the model starts with, what dropping sums does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.studies import by_claim, check_page, run_quick
from tpcheck.config.load import parse_run
from tpcheck.cost.memory import parameters
from tpcheck.study.communication import STUDY
from tpcheck.study.communication.findings import case, findings, mean_losses
from tpcheck.study.communication.settings import SIZES, Communication
from tpcheck.study.study import Results

FOLDER: dict[str, Path] = {}
QUICK = Communication.quick()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    FOLDER["out"] = tmp_path_factory.mktemp("study") / "out"
    return run_quick(STUDY, FOLDER["out"])


def test_a_step_sends_what_cost_says_to_the_byte(results: Results) -> None:
    cases = results["collectives"]["cases"]
    assert [(one["tp"], one["sp"]) for one in cases] == [(1, False), (2, False), (4, False), (8, False), (2, True),
                                                         (4, True), (8, True)]  # fmt: skip
    assert all(one["sent"] == one["on_paper"] for one in cases)
    assert not cases[0]["step"] and all(one["sent"] for one in cases[1:])
    assert by_claim(findings(results), "tpcheck cost").verdict == "holds"


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_a_layer_has_two_all_reduces_each_way_of_its_activations(results: Results, tp: int) -> None:
    message = 2 * QUICK.seq_length * QUICK.hidden
    assert case(results, tp)["layer"] == [
        {"phase": phase, "name": "all-reduce", "bytes": message, "count": 2} for phase in ("forward", "backward")
    ]
    with_sp = {(row["phase"], row["name"]): row["count"] for row in case(results, tp, True)["layer"]
               if row["phase"] != "step"}  # fmt: skip
    assert with_sp == {("forward", "all-gather"): 2, ("forward", "reduce-scatter"): 2, ("backward", "all-gather"): 4,
                       ("backward", "reduce-scatter"): 2}  # fmt: skip
    assert case(results, tp, True)["sent"] > case(results, tp)["sent"]


def test_a_is_cut_by_columns_and_b_by_rows(results: Results) -> None:
    shapes, hidden = results["collectives"]["shapes"], QUICK.hidden
    assert shapes["fc1"] == [2 * hidden, hidden] and shapes["fc2"] == [hidden, 2 * hidden]
    assert shapes["QKV"] == [3 * hidden // 2, hidden] and shapes["proj"] == [hidden, hidden // 2]


def test_the_initial_loss_follows_from_what_is_asked_for(results: Results) -> None:
    tied, untied = mean_losses(results, True), mean_losses(results, False)
    random = results["loss"]["ln_v"] + results["loss"]["spread"]
    # The mean over 128 tokens of a logit's deviation of about 0.28, over two seeds, three times.
    assert tied["derived"] == pytest.approx(tied["same"], abs=0.06)
    assert tied["next"] == pytest.approx(random, abs=0.06) and untied["same"] == pytest.approx(random, abs=0.06)
    assert random - tied["same"] > 0.5


def test_the_counted_model_is_the_one_of_the_analysis() -> None:
    whole = parameters(parse_run({"model": {"preset": "gpt2-124m", "vocab_size": 50304}, "seq_length": 1024}))
    biases_and_norms = 12 * (3 * 768 + 768 + 4 * 768 + 768 + 4 * 768) + 2 * 768
    assert f"{(whole + biases_and_norms - 1024 * 768) / 1e6:.2f}" == "123.69"


def test_float32_sums_are_better_and_the_tree_is_the_same_everywhere(results: Results) -> None:
    rows = {(row["how"], row["tp"]): row for row in results["sums"]["rows"]}
    rounding = results["sums"]["rounding"]
    errors = [rows["bfloat16", tp]["relative"] for tp in SIZES]
    assert errors == sorted(errors) and errors[-1] > 1.5 * rounding
    for tp in SIZES:
        assert rows["tree", tp]["differing"] == 0
        assert rows["tree", tp]["relative"] == pytest.approx(rounding, rel=1e-3)
        assert rows["float32", tp]["relative"] == pytest.approx(rounding, rel=1e-3)
    assert rows["bfloat16", 8]["differing"] > 0


def test_dropped_sums_make_another_model_of_every_tp(results: Results) -> None:
    found = results["spd"]
    assert found["curve"][-1] < 0.8 * found["curve"][0]  # it has learned something
    losses = found["losses"]
    assert sorted(found["order"]) == list(range(QUICK.trained_layers))
    whole = losses["1"][0]
    for tp in map(str, SIZES):
        assert losses[tp][0] == pytest.approx(whole, rel=1e-7)  # float32 over ranks, nothing dropped
    assert losses["1"] == pytest.approx([whole] * len(losses["1"]), rel=1e-7)  # nothing is cut at TP=1
    for tp in ("2", "4", "8"):
        assert abs(losses[tp][-1] / whole - 1) > 1e-4
    assert abs(losses["2"][-1] - losses["8"][-1]) > 1e-4
    assert by_claim(findings(results), "same model at another TP size").verdict == "does not hold"


def test_every_collective_was_timed(results: Results) -> None:
    rows = results["times"]["collectives"]
    assert len(rows) == 3 * 2 * 4 and all(row["ms"] > 0 for row in rows)


def test_claims_of_the_analysis_are_answered(results: Results) -> None:
    verdicts = {"two all-reduces": "holds only if nobody runs backward", "cut by rows": "does not hold",
                "puts the ranks' parts": "does not hold", "LayerNorm": "holds only if sequence parallelism is on",
                "saves communication": "does not hold", "as good as in float32": "does not hold"}  # fmt: skip
    for words, verdict in verdicts.items():
        assert by_claim(findings(results), words).verdict == verdict


def test_page_is_whole(results: Results, tmp_path: Path) -> None:
    check_page(STUDY, FOLDER["out"], pictures=3, scratch=tmp_path)
