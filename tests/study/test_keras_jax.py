"""What `tpcheck study keras-jax` finds: rounding where sums are spread, mutants seen or not, the contract's bits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patches.order.exact.products import product
from tests.support.studies import by_claim, check_page, run_quick
from tpcheck.study.keras_jax import STUDY
from tpcheck.study.keras_jax.findings import LOOKED_AT, SEEN, findings, kinds_of_bits, which_tests_see
from tpcheck.study.keras_jax.mutants import MUTANTS
from tpcheck.study.keras_jax.operands import operands
from tpcheck.study.keras_jax.processes import on_devices
from tpcheck.study.study import Results

# Found without being imported: a process that has used JAX must not fork, and ranks of other tests are forked.
pytestmark = [
    pytest.mark.skipif(not (find_spec("jax") and find_spec("keras")), reason="Keras and JAX are not installed"),
    pytest.mark.timeout(1800),
]
FOLDER: dict[str, Path] = {}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    FOLDER["out"] = tmp_path_factory.mktemp("study") / "out"
    return run_quick(STUDY, FOLDER["out"])


@pytest.mark.parametrize("devices", [2, 4])
def test_models_that_are_really_sharded_are_rounding_away_from_one_device(results: Results, devices: int) -> None:
    for name, found in results[f"keras-{devices}"].items():
        one = found["sharded"]
        # Sums of at most 256 products of about 1, relative to the largest output.
        assert 0 < one["forward max"] < 256 * 2.0**-24 * max(found["largest output"], 1), name
        assert one["1 SGD step"]["tensors"] and one["Adam steps"]["tensors"], name
        assert any(local != full for full, local in one["local"].values()), name
        assert {kind for kind, _ in one["collectives"]["both"]} == {"all-reduce"}, name
    assert by_claim(findings(results), "sharded model's output").verdict == "does not hold"
    assert by_claim(findings(results), "weights are the same").verdict == "does not hold"


def test_each_device_has_its_share_of_what_is_cut(results: Results) -> None:
    shapes = {name: found["sharded"]["local"] for name, found in results["keras-4"].items()}
    assert shapes["embedding"]["emb/embeddings"] == [[1000, 64], [250, 64]]
    assert shapes["self-attention"]["mha/query/bias"] == [[8, 8], [2, 8]]
    assert shapes["EinsumDense"]["e2/kernel"] == [[96, 64], [24, 64]]
    assert shapes["MLP"]["d2/bias"] == [[256], [256]]  # of a row layer: replicated


def test_a_row_layer_reduces_forward_a_column_layer_backward(results: Results) -> None:
    found = results["keras-2"]["EinsumDense"]["sharded"]["collectives"]  # column, row, column
    assert found == {"forward": [["all-reduce", "f32[24,64]"]], "both": [["all-reduce", "f32[24,64]"]] * 2}


def test_gradients_with_random_biases_see_every_mutant_and_nothing_else(results: Results) -> None:
    assert not any(which_tests_see(results["rules"], "", biases) for biases in ("zero", "random"))
    for mutant in MUTANTS:
        assert "gradients" in which_tests_see(results["rules"], mutant, "random"), mutant


@pytest.mark.parametrize(("mutant", "biases", "blind"), [
    ("bias of a row layer added before the sum", "zero", {"loss", "forward", "gradients"}),
    ("bias of a column layer not sharded", "zero", {"loss", "forward"}),
    ("no sum in a column layer's backward", "random", {"loss", "forward"}),
    ("sum in a row layer's backward, too", "random", {"loss", "forward"}),
    ("bias gradient of a row layer summed over devices", "random", {"loss", "forward"}),
    ("vocabulary not masked", "zero", set()),
])  # fmt: skip
def test_what_misses_a_mutant(results: Results, mutant: str, biases: str, blind: set[str]) -> None:
    assert set(LOOKED_AT) - set(which_tests_see(results["rules"], mutant, biases)) == blind
    (row,) = [row for row in results["rules"]["mutants"] if (row["mutant"], row["biases"]) == (mutant, biases)]
    assert row["later loss"] > SEEN


def test_nothing_rounded_nothing_different(results: Results) -> None:
    assert set(results["rules"]["integers"].values()) == {0.0}


def test_the_products_of_xla_follow_their_shape_and_exact_ones_do_not(results: Results) -> None:
    most = {(row["product"], row["dtype"]): 0.0 for row in results["leaves"]["products"]}
    for row in results["leaves"]["products"]:
        key = row["product"], row["dtype"]
        most[key] = max(most[key], *row["percent"].values())
    assert most["exact", "fp32"] == most["exact", "bf16"] == 0
    assert most["XLA's dot", "fp32"] > 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tree_layers_have_the_same_bits_on_1_2_4_and_8_devices_and_stock_ones_do_not(
    results: Results, dtype: str
) -> None:
    contract = results["contract"]
    assert list(contract) == ["1", "2", "4", "8"]
    for what, names in (("bits", {"y", "dx", "dw1", "db1", "dw2", "db2"}), ("trained", {"w1", "b1", "w2", "b2"})):
        kinds = kinds_of_bits(contract, f"tree {dtype}", what)
        assert kinds.keys() == names and set(kinds.values()) == {1}
        assert max(kinds_of_bits(contract, f"stock {dtype}", what).values()) > 1
    for devices, run in contract.items():
        sent = sorted(name for name, _ in run[f"tree {dtype}"]["collectives"])
        assert sent == ([] if devices == "1" else ["all-gather", "all-gather", "all-to-all", "all-to-all"])
        assert all("f32" in shape for _, shape in run[f"stock {dtype}"]["collectives"])  # excess precision in bfloat16
        assert run[f"tree {dtype}"]["local"]["w2"] == [416 // int(devices), 256]


def test_tree_layers_have_the_bits_of_the_patches_under_pytorch() -> None:
    found = on_devices(2, "contract.digests", tokens=16, hidden=64, ffn=104, steps=1, dtypes=[*DTYPES], values=True)
    for name, dtype in DTYPES.items():
        expected = _in_torch({n: torch.from_numpy(v).float().to(dtype) for n, v in operands(16, 64, 104).items()})
        for tensor, value in expected.items():
            bits = value.contiguous().view(torch.int16 if dtype == torch.bfloat16 else torch.int32).numpy()
            theirs = np.frombuffer(bytes.fromhex(found[f"tree {name}"]["values"][tensor]), bits.dtype)
            assert np.array_equal(bits.flatten(), theirs), (name, tensor)


def _in_torch(p: dict[str, Any]) -> dict[str, torch.Tensor]:
    """row(relu(column(x))) and its gradients, of the patches' products; 8 leaves wherever ranks would share a sum."""
    dtype, dy = p["x"].dtype, p["dy"]
    before = product(p["x"], p["w1"], dtype=dtype) + p["b1"]
    inner = before.relu()
    d_before = product(dy, p["w2"].t(), dtype=dtype).where(before > 0, 0.0)
    ones = torch.ones(1, len(dy), dtype=dtype)
    return {
        "y": product(inner, p["w2"], leaves=8, dtype=dtype) + p["b2"],
        "dw2": product(inner.t(), dy, dtype=dtype),
        "db2": product(ones, dy, dtype=dtype)[0],
        "dx": product(d_before, p["w1"].t(), leaves=8, dtype=dtype),
        "dw1": product(p["x"].t(), d_before, dtype=dtype),
        "db1": product(ones, d_before, dtype=dtype)[0],
    }


def test_the_page_shows_it(results: Results, tmp_path: Path) -> None:
    check_page(STUDY, FOLDER["out"], 1, tmp_path)
    verdicts = {one.claim: one.verdict for one in findings(results)}
    assert verdicts["tree layers have the same bits on 1, 2, 4, 8 devices"] == "holds"
    assert verdicts["stock layers have the same bits on 1, 2, 4, 8 devices"] == "does not hold"
