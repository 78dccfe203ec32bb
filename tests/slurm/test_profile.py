"""Cluster profiles: what they may say, what is refused in one line, and what cells take of their machines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm.allocation import allocation_of
from slurm.profile import Profile, load_profile
from tpcheck.config.load import parse_run
from tpcheck.errors import TpcheckError
from tpcheck.sweep.spec import Cell

H100 = {"nodes": 2, "gpus_per_node": 8, "memory_gib": 80}
LEAST: dict[str, Any] = {"time": "4:00:00", "architectures": {"h100": H100}}


def profile(**changes: Any) -> Profile:
    return Profile.model_validate(LEAST | changes)


def load(folder: Path, content: Any) -> Profile:
    path = folder / "cluster.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_profile(str(path))


@pytest.mark.parametrize("name", ["example", "local"])
def test_the_profiles_of_the_package_are_good_ones(name: str) -> None:
    assert set(load_profile(name).architectures) == {"h100", "b300"}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("0:01:00", 1), ("4:00:00", 240), ("1-12:00:00", 36 * 60), ("0:00:30", 1), ("100:00:00", 6000)],
)
def test_times_are_written_as_slurm_writes_them(text: str, minutes: int) -> None:
    assert profile(time=text, save_before_end=30).time == minutes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partiton": "x"}, "unknown key partiton: did you mean partition? allowed are partition, account"),
        (
            {"architectures": {"h100": {**H100, "gpus": 8}}},
            "unknown key architectures.h100.gpus: allowed are partition",
        ),
        ({"container": {"image": "x", "mount": []}}, "unknown key container.mount: did you mean mounts?"),
        ({"architectures": {"h100": {"nodes": 1, "gpus_per_node": 1}}}, "architectures.h100.memory_gib is missing"),
        ({"architectures": {"h100": {"nodes": 1, "memory_gib": 1}}}, "give gpus_per_node, or ranks_per_node"),
        ({"architectures": {}}, "architectures"),
        (
            {"architectures": {"h100": H100, "b300": H100}},
            "ask Slurm for the same machines: give each a partition",
        ),
        ({"time": 14400}, 'time: write it in quotes as "4:00:00"'),  # what YAML makes of 4:00:00 without them
        ({"time": "0:00:00"}, "time: it must be at least a minute"),
        ({"time": "0:05:00"}, "save_before_end=300 seconds is not below time=5 minutes"),
        ({"env": {"A": True}}, "env.A: write 1, 0 or a word in quotes, not true"),
        ({"env": {"A B": "x"}}, "'A B' is no name of an environment variable"),
        ({"env": {"A": "x\nrm -rf /"}}, "env.A: line ends and control characters are not allowed"),
        ({"env": {"A": "x\u2028y"}}, "env.A: "),
        ({"setup": ["module load\x00"]}, "setup.0: "),
        ({"sbatch": {"array": "0-3"}}, "sbatch.array: array is decided by throttle"),
        ({"sbatch": {"--mem": 0}}, "'--mem' is no long option"),
        ({"sbatch": {"mem": None}}, "sbatch.mem: give it a value, or true for an option that takes none, not None"),
        ({"sbatch": {"mail-type": False}}, "not False; or leave it out"),
        ({"srun": {"x\ny": 1}}, "no long option"),
        ({"partition": ["a"]}, "partition: Input should be a valid string"),
        ({"launcher": "mpirun"}, "launcher: Input should be 'srun' or 'torchrun', not 'mpirun'"),
        ({"python": []}, "python"),
        ({"python": ""}, "python.0: it is empty: give it a value, or leave it out"),
        ({"partition": " "}, "partition: it is empty: give it a value, or leave it out"),
        ({"reservation": math.nan}, "reservation: nan is no text"),
        ({"env": {"A": math.inf}}, "env.A: inf is no text"),
        ({"sbatch": {"mem": math.inf}}, "sbatch.mem: give it a value, or true for an option that takes none, not inf"),
        ({"sbatch": {"wait": True}}, "sbatch.wait: wait is decided by --wait of tpcheck sweep"),
        ({"sbatch": {"parsable": True}}, "sbatch.parsable: parsable is decided by tpcheck, which reads"),
        ({"sbatch": {"clusters": "b"}}, "sbatch.clusters: clusters is decided by SLURM_CONF"),
        ({"exclusive": "zero"}, "exclusive: Input should be a valid boolean, not 'zero'"),
        ({"exclusive": 0}, "exclusive: Input should be a valid boolean, not 0"),
        ({"throttle": True}, "throttle: write a number, not true"),
        ({"max_retries": "3"}, "max_retries: write a number, not '3'"),
        ({"max_retries": 1 << 70}, "max_retries: Input should be less than or equal to 10000"),
        ({"time": "99-00:00:00", "save_before_end": 70000}, "save_before_end: Input should be less than or equal to"),
        *(
            ({"architectures": {"h100": H100 | {key: value}}}, f"architectures.h100.{key}: {why}")
            for key, value, why in [
                ("nodes", True, "write a number, not true"),
                ("gpus_per_node", True, "write a number, not true"),
                ("ranks_per_node", "2", "write a number, not '2'"),
                ("memory_gib", math.inf, "Input should be a finite number, not inf"),
                ("tflops", math.inf, "Input should be a finite number, not inf"),
                ("tflops", True, "write a number, not true"),
                ("request_gpus", 1, "Input should be a valid boolean, not 1"),
            ]
        ),
    ],
)
def test_a_bad_profile_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TpcheckError) as error:
        load(tmp_path, LEAST | changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/cluster.yaml: ")


def test_a_tilde_is_the_home_of_whoever_submits(monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    many = profile(
        python=["apptainer", "exec", "~/image.sif", "python"],
        logs="~/logs",
        container={"image": "~/x.sqsh", "mounts": ["~/data:/data"]},
    )
    assert many.command == ["apptainer", "exec", "/home/me/image.sif", "python"]
    assert many.logs == "/home/me/logs"
    assert many.container
    assert (many.container.image, many.container.mounts) == ("/home/me/x.sqsh", ["/home/me/data:/data"])
    assert profile(python="~/venv/bin/python").command == ["/home/me/venv/bin/python"]


@pytest.mark.parametrize("key", ["partition", "time", "throttle", "exclusive", "launcher", "setup", "x" * 5000])
def test_a_long_value_does_not_flood_the_message(tmp_path: Path, key: str) -> None:
    with pytest.raises(TpcheckError) as error:
        load(tmp_path, LEAST | {key: f"{'x' * 100_000}\x00" if key == "partition" else "x" * 100_000})
    assert key[:80] in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1", "is not YAML"), ("time: 2026-13-45", "is not YAML"), ("- a", "holds a list, not a cluster profile")],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TpcheckError, match=message):
        load(tmp_path, text)


def test_an_unknown_cluster_names_the_known_ones() -> None:
    with pytest.raises(TpcheckError, match="unknown cluster nope: slurm/clusters has example, local"):
        load_profile("nope")


def test_a_profile_beside_the_sweep_files_overrides_the_packages(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "slurm" / "clusters").mkdir(parents=True)
    (tmp_path / "slurm" / "clusters" / "local.yaml").write_text(yaml.safe_dump(LEAST | {"account": "mine"}))
    monkeypatch.chdir(tmp_path)
    assert load_profile("local").account == "mine"


def cell(tp: int, dp: int = 1, arch: str | None = "h100", **settings: Any) -> Cell:
    run = {"tp": tp, "dp": dp, "global_batch_size": 2 * dp, "leaves": 64, "strategy": "stock", **settings}
    run["model"] = {"preset": "qwen3-tiny", "num_attention_heads": 64, "num_query_groups": 64, "ffn_hidden_size": 384}
    return Cell(f"tp{tp}-dp{dp}", {}, {}, parse_run(run), arch)


@pytest.mark.parametrize(
    ("tp", "dp", "nodes", "ranks"),
    [(1, 1, 1, 1), (4, 2, 1, 8), (4, 4, 2, 8), (8, 2, 2, 8), (4, 3, 3, 4), (2, 5, 5, 2), (16, 1, 2, 8)],
)
def test_a_tp_group_stays_in_its_node_wherever_it_can(tp: int, dp: int, nodes: int, ranks: int) -> None:
    many = profile(architectures={"h100": {**H100, "nodes": 8}})
    found = allocation_of(cell(tp, dp), many)
    assert (found.nodes, found.ranks_per_node) == (nodes, ranks)


def test_pipeline_stages_may_lie_on_different_nodes() -> None:
    found = allocation_of(cell(8, pp=2), profile(architectures={"h100": {**H100, "nodes": 8}}))
    assert (found.nodes, found.ranks_per_node) == (2, 8)


def test_cells_without_an_arch_go_to_the_only_machines_there_are() -> None:
    assert allocation_of(cell(1, arch=None), profile()).arch == "h100"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (cell(1, arch="a100"), "cell tp1-dp1 wants arch a100, the cluster has h100, b300"),
        (cell(1, arch=None), "may run anywhere, the cluster has h100, b300: add arch: [h100, b300] to the matrix"),
        (cell(8, 4), "needs 32 GPUs (tp * pp * dp = 8 * 1 * 4) on 4 nodes, the profile has 2 h100 nodes of 8"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(wanted: Cell, message: str) -> None:
    with pytest.raises(TpcheckError) as error:
        allocation_of(wanted, profile(architectures={"h100": H100, "b300": {**H100, "constraint": "b300"}}))
    assert message in str(error.value)
