"""Sweep files: what cells they make, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.finished import sweep, sweep_file
from tpcheck.errors import TpcheckError
from tpcheck.sweep.spec import load_sweep
from tpcheck.sweep.stored_spec import read_sweep, write_sweep


def test_the_matrix_gives_one_cell_per_combination_named_after_its_settings(tmp_path: Path) -> None:
    cells = sweep(tmp_path, matrix={"strategy": ["tree"], "tp": [1, 8], "sequence_parallel": [False, True]}).cells
    assert [cell.name for cell in cells] == [
        "tree-tp1-no-sequence_parallel",
        "tree-tp1-sequence_parallel",
        "tree-tp8-no-sequence_parallel",
        "tree-tp8-sequence_parallel",
    ]
    last = cells[-1]
    assert (last.config.strategy, last.config.tp, last.config.sequence_parallel) == ("tree", 8, True)
    assert last.path == tmp_path / "out" / last.name


def test_groups_hold_the_cells_that_differ_only_in_invariant_settings(tmp_path: Path) -> None:
    found = sweep(tmp_path, matrix={"strategy": ["stock", "tree"], "seed": [1, 2], "tp": [1, 2]}).groups()
    assert [name for name, _ in found] == ["stock-seed1", "stock-seed2", "tree-seed1", "tree-seed2"]
    assert [cell.variant for cell in found[0][1]] == ["TP=1", "TP=2"]


def test_settings_that_only_look_alike_in_a_name_are_not_of_one_group(tmp_path: Path) -> None:
    alike = [{"data.path": "a b", "tp": 1}, {"data.path": "a_b", "tp": 2}]
    found = sweep(tmp_path, matrix={"strategy": ["tree"]}, layouts=alike).groups()
    assert [[cell.name for cell in cells] for _, cells in found] == [["tree-a_b-tp1"], ["tree-a_b-tp2"]]


def test_nested_settings_can_be_in_the_matrix(tmp_path: Path) -> None:
    cells = sweep(tmp_path, matrix={"optimizer.lr": [1e-5, 1e-4], "model.num_layers": [1]}).cells
    assert [cell.name for cell in cells] == ["lr1e-05-num_layers1", "lr0.0001-num_layers1"]
    assert [cell.config.optimizer.lr for cell in cells] == [1e-5, 1e-4]
    assert all(cell.config.model.num_layers == 1 for cell in cells)


def test_excluded_cells_are_left_out(tmp_path: Path) -> None:
    cells = sweep(tmp_path, exclude=[{"strategy": "stock", "tp": 2}]).cells
    assert [cell.name for cell in cells] == ["stock-tp1", "tree-tp1", "tree-tp2"]


def test_a_base_can_be_a_run_file_beside_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: qwen3-tiny\nsteps: 7\noutput: elsewhere\n")
    cells = sweep(tmp_path, base="run.yaml").cells
    assert {cell.config.steps for cell in cells} == {7}
    assert cells[0].path == tmp_path / "out" / "stock-tp1"


def test_overrides_reach_the_base_run_and_the_output(tmp_path: Path) -> None:
    loaded = load_sweep(sweep_file(tmp_path), ["steps=5", "optimizer.lr=0.5", f"output={tmp_path}/other"])
    assert loaded.output == tmp_path / "other"
    assert (loaded.cells[0].config.steps, loaded.cells[0].config.optimizer.lr) == (5, 0.5)
    assert loaded.cells[0].path.parent == tmp_path / "other"


def test_without_an_output_results_go_to_results(tmp_path: Path) -> None:
    assert sweep(tmp_path, output=None).output == Path("results/s")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matirx": {}}, "unknown key matirx: a sweep file has name, base, matrix"),
        ({"matrix": {}}, "matrix is empty"),
        ({"matrix": {"tp": []}}, "matrix.tp is empty"),
        ({"matrix": {"tp": 4}}, "matrix.tp: "),
        ({"matrix": {"tp": [1, {"a": 1}]}}, "matrix.tp.1"),
        ({"matrix": {"tpp": [1]}}, "cell tpp1: unknown key tpp: did you mean tp?"),
        ({"matrix": {"tp": [10**300]}}, "a cell would be called 'tp1000"),
        ({"matrix": {"tp": [1, 1]}}, "would both be cell tp1"),
        ({"matrix": {"data.path": ["/a/b", "/a b"]}}, "would both be cell a_b"),
        ({"name": "n" * 201}, "name: String should have at most 200 characters"),
        ({"matrix": {"arch": [100]}}, "matrix.arch holds [100]: name machines as the cluster's profile does"),
        ({"matrix": {"output": ["x"]}}, "output cannot be in the matrix"),
        ({"matrix": {"strategy": ["tree"], "tp": [3]}}, "cell tree-tp3: tp=3"),
        ({"exclude": [{"seed": 3}]}, "its keys must be keys of the matrix (strategy, tp)"),
        ({"exclude": [{"tp": 16}]}, "matches no cell"),
        ({"exclude": [{"tp": 1}, {"tp": 2}]}, "every cell is excluded"),
        ({"base": {"model": "qwen3-tinny"}}, "'qwen3-tinny'"),
        ({"base": "missing.yaml"}, "cannot read"),
        ({"name": "../up"}, "name: "),
    ],
)
def test_a_bad_sweep_file_is_refused_and_the_message_says_what_to_do(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TpcheckError) as caught:
        sweep(tmp_path, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds a NoneType, not a sweep"),
        ("[1]", "holds a list"),
        ("a: [", "is not YAML"),
        ("base: {x: 2026-13-45}", "is not YAML"),
        ("name: x", "base is missing"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(TpcheckError, match=message):
        load_sweep(tmp_path / "s.yaml")


def test_an_override_of_a_matrix_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TpcheckError, match=r"tp is what the matrix of .* varies"):
        load_sweep(sweep_file(tmp_path), ["tp=4"])


def test_the_demo_sweep_is_valid_and_covers_every_strategy_and_size() -> None:
    demo = load_sweep(ROOT / "slurm/sweeps/qwen3-tiny-cpu.yaml")
    found = {(cell.config.strategy, cell.config.tp) for cell in demo.cells}
    assert found == {(strategy, tp) for strategy in ("stock", "gather", "tree") for tp in (1, 2, 4, 8)}
    assert all(cell.config.dtype == "bf16" and cell.config.steps >= 20 for cell in demo.cells)


def test_arch_is_an_axis_of_cells_that_runs_know_nothing_of(tmp_path: Path) -> None:
    loaded = sweep(tmp_path, matrix={"arch": ["h100", "b300"], "strategy": ["tree"], "tp": [1, 2]})
    assert [(cell.name, cell.arch) for cell in loaded.cells[:2]] == [
        ("h100-tree-tp1", "h100"),
        ("h100-tree-tp2", "h100"),
    ]
    [(name, group)] = loaded.groups()
    assert name == "tree" and [cell.variant for cell in group] == ["h100 TP=1", "h100 TP=2", "b300 TP=1", "b300 TP=2"]


def test_where_there_is_no_choice_of_machines_the_axis_arch_is_left_out(tmp_path: Path) -> None:
    matrix = {"arch": ["h100", "b300"], "tp": [1, 2]}
    loaded = load_sweep(sweep_file(tmp_path, matrix=matrix, exclude=[{"arch": "h100", "tp": 1}]), anywhere=True)
    assert [(cell.name, cell.arch) for cell in loaded.cells] == [("tp1", None), ("tp2", None)]
    assert loaded.archs == ("h100", "b300")


def test_a_sweep_read_back_from_its_results_is_the_same_sweep(tmp_path: Path) -> None:
    loaded = sweep(tmp_path, matrix={"arch": ["h100"], "strategy": ["tree"], "tp": [1, 2]}, invariant=["tp"])
    write_sweep(loaded)
    assert read_sweep(loaded.output) == loaded


def test_results_that_have_moved_are_read_where_they_are_now(tmp_path: Path) -> None:
    loaded = sweep(tmp_path)
    write_sweep(loaded)
    loaded.output.rename(tmp_path / "moved")
    assert read_sweep(tmp_path / "moved").cells[0].path == tmp_path / "moved" / loaded.cells[0].name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"invariant": ["tpp"]}, "invariant: 'tpp' is no setting: did you mean tp?"),
        ({"matrix": {"strategy": ["tree"], "threads": [1, 1.0]}}, "are the same run"),
        ({"matrix": {"tp": [1, True]}}, "tp is not a matter of true"),
        ({"matrix": {"data.path": ["a/b", "a/B"]}}, "would be one directory on some file systems"),
        ({"output": "/"}, r"output=/ "),
        ({"output": ""}, "output=''"),
    ],
)
def test_what_would_compare_nothing_is_refused(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(TpcheckError, match=words.replace("?", "[?]")):
        sweep(tmp_path, **changes)


def test_an_output_that_yaml_reads_as_something_else_is_refused(tmp_path: Path) -> None:
    for text in ("", "true", "3"):
        with pytest.raises(TpcheckError, match="names no directory"):
            load_sweep(sweep_file(tmp_path), [f"output={text}"])
