"""Batch scripts: word for word for several sites, no value can add a line or be executed, and when they queue again."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import ROOT
from tests.support.slurm_scripts import GOLDEN, SITES, Ran, in_folder, run, script
from tpcheck.errors import TpcheckError

SBATCH_FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
REQUEUE = ROOT / "slurm" / "requeue.sh"
HOSTILE = st.text(
    st.sampled_from(list("ab =:,/.-_#%&;|<>(){}[]*?!~^$`'\"\\ é")) | st.characters(codec="utf-8"), max_size=20
)


@pytest.mark.parametrize("site", SITES)
def test_the_script_of_a_site_is_this_one(site: str) -> None:
    anew = "python -m tests.support.slurm_scripts, and look at it"
    assert script(site).text == (GOLDEN / f"{site}.sh").read_text(), anew


@pytest.mark.parametrize("path", [*sorted(GOLDEN.glob("*.sh")), *SBATCH_FILES, REQUEUE], ids=lambda path: path.name)
def test_scripts_are_good_bash(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", path], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("path", [*sorted(GOLDEN.glob("*.sh")), *SBATCH_FILES], ids=lambda path: path.name)
def test_every_script_follows_the_same_rules_around_its_step(path: Path) -> None:
    lines = path.read_text().rstrip().splitlines()
    starts = ('if ! source "$requeue"', "meet", 'begin "$cell" ', "srun ", "finish")
    found = [[number for number, line in enumerate(lines) if line.startswith(start)] for start in starts]
    order = [number for [number] in found]
    assert order == sorted(order) and order[-1] == len(lines) - 1


@pytest.mark.parametrize("content", [None, "", REQUEUE.read_text()[:2000]], ids=["missing", "empty", "cut-short"])
@pytest.mark.parametrize("path", [None, *SBATCH_FILES], ids=lambda path: path.name if path else "submitted")
def test_a_job_that_cannot_read_the_rules_says_so_and_trains_nothing(
    tmp_path: Path, path: Path | None, content: str | None
) -> None:
    one = in_folder(script(), tmp_path)
    requeue = one.code / "slurm" / "requeue.sh"
    requeue.unlink()
    if content is not None:
        requeue.write_text(content)
    (tmp_path / "out" / "cells.txt").write_text("tree-tp2\n")
    wanted = {"CODE": str(one.code), "OUTPUT": "out", "RUN": "run.yaml", "SLURM_ARRAY_TASK_ID": "0"} if path else {}
    ran = run(path.read_text() if path else one.text, tmp_path, **wanted)
    assert (ran.code, ran.steps, ran.requeued) == (1, [], [])
    assert f"tpcheck: cannot read {requeue}, which queues jobs again" in ran.output.splitlines()[-1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HOSTILE)
def test_no_value_can_add_a_line_or_be_executed(tmp_path: Path, value: str) -> None:
    site: dict[str, Any] = {
        "partition": value,
        "account": value,
        "python": [value, value],
        "env": {"SHOWN": value},
        "sbatch": {"comment": value},
        "srun": {"cpu-bind": value},
        "container": {"image": value, "mounts": [value], "workdir": value},
    }
    try:
        one = script("srun-gpu", **site, setup=[])
        text = in_folder(one, tmp_path).text
    except (ValueError, TpcheckError):
        return  # refused
    tame = in_folder(script("srun-gpu", **_tamed(site), setup=[]), tmp_path).text
    assert len(re.split(r"[\r\n]", text)) == len(tame.split("\n"))
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH")]
    assert [f"--comment={value}"] in options and [f"--account={value}"] in options
    for old in ("steps", "requeued"):
        (tmp_path / old).unlink(missing_ok=True)
    ran = run(text, tmp_path, "exit 1")
    [[shown, *words]] = ran.steps
    assert shown == value
    mounts = f"--container-mounts={value},{tmp_path}/out:{tmp_path}/out"
    assert {f"--cpu-bind={value}", f"--container-image={value}", f"--container-workdir={value}", mounts} <= set(words)
    assert words[-6:-2] == [value, value, f"{tmp_path}/out/code/0123456789ab", "train"]


def _tamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tamed(inner) for key, inner in value.items()}
    return [_tamed(inner) for inner in value] if isinstance(value, list) else "x"


@pytest.mark.parametrize("name", ["a b", "$(touch PWNED)", "`touch PWNED`", 'q"uote', "it's", "semi;touch PWNED", "#x"])
def test_the_folders_of_a_sweep_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    ran = run(in_folder(script(), folder).text, folder, f"touch {shlex.quote(str(folder))}/out/tree-tp2/digests.json")
    assert ran.code == 0 and ran.steps[0][-3:] == ["train", f"{folder}/out/tree-tp2/run.yaml", "--resume"]
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("name", ["per%cent", "line\nend", "tab\there", "back\\slash"])
def test_folders_that_a_script_cannot_hold_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TpcheckError, match=r"sbatch would replace the %|control characters|takes every backslash"):
        assert in_folder(script(), tmp_path / name).text


@pytest.mark.parametrize("place", ["output", "code", "folder", "cwd"])
def test_no_path_may_hold_a_backslash(place: str) -> None:
    with pytest.raises(TpcheckError, match=r"back\\slash: sbatch takes every backslash away"):
        assert replace(script(), **{place: Path("/back\\slash")}).text


def test_backslashes_are_refused_where_sbatch_would_drop_them() -> None:
    with pytest.raises(TpcheckError, match="sbatch takes every backslash away"):
        assert script(sbatch={"comment": "a\\b"}).text


def test_options_that_are_passed_through_override_our_own() -> None:
    text = script("srun-gpu", sbatch={"gpus-per-node": "h100:4", "exclusive": "user"}).text
    assert "#SBATCH --gpus-per-node=h100:4\n" in text and "#SBATCH --exclusive=user\n" in text
    assert text.count("gpus-per-node") == text.count("exclusive") == 1


CELL = 'cell=$PWD/out/tree-tp2; note() { echo "{\\"kind\\": \\"$1\\"}" >>"$cell/ends.jsonl"; };'


@pytest.mark.parametrize(
    ("step", "environment", "code", "requeued"),
    [
        pytest.param("touch $cell/digests.json", {}, 0, False, id="complete"),
        pytest.param("touch $cell/digests.json; exit 1", {}, 0, False, id="complete-all-the-same"),
        pytest.param("touch -d yesterday $cell/digests.json", {}, 0, False, id="complete-since-yesterday"),
        pytest.param("touch -d yesterday $cell/digests.json; exit 2", {}, 2, False, id="bad-input-beside-old-digests"),
        pytest.param("touch -d yesterday $cell/digests.json; exit 137", {}, 0, True, id="killed-beside-old-digests"),
        pytest.param("exit 0", {}, 0, True, id="saved-and-left"),
        pytest.param("note stopped; exit 1", {}, 0, True, id="saved-under-torchrun"),
        pytest.param("exit 137", {}, 0, True, id="killed"),
        pytest.param("note lost; exit 1", {}, 0, True, id="lost-a-rank"),
        pytest.param("exit 140", {}, 0, True, id="usr2-before-it-could-save"),
        pytest.param("exit 1", {}, 1, False, id="error"),
        pytest.param("exit 2", {}, 2, False, id="bad-input"),
        pytest.param("note failed; exit 137", {}, 137, False, id="error-whose-peers-were-killed"),
        pytest.param("note lost; note failed; exit 1", {}, 1, False, id="error-that-peers-call-lost"),
        pytest.param("exit 137", {"SLURM_RESTART_COUNT": "9"}, 0, True, id="last-retry"),
        pytest.param("exit 137", {"SLURM_RESTART_COUNT": "10"}, 137, False, id="no-retry-left"),
        pytest.param("exit 0", {"SLURM_RESTART_COUNT": "10"}, 1, False, id="no-retry-left-to-go-on"),
        pytest.param("exit 0", {"FAKE_STATE": "COMPLETING None"}, 1, False, id="cancelled-or-preempted"),
        pytest.param("exit 137", {"FAKE_STATE": "COMPLETING None"}, 137, False, id="cancelled-and-killed"),
        pytest.param("exit 137", {"FAKE_STATE": "COMPLETING TimeLimit"}, 0, True, id="time-limit-before-it-could-save"),
        pytest.param("exit 0", {"FAKE_STATE": "SIGNALING None"}, 0, True, id="saved-before-slurm-had-told-all-ranks"),
        pytest.param("touch $cell/cancelled; exit 0", {}, 1, False, id="tpcheck-cancel"),
    ],
)
def test_a_cell_is_queued_again_when_it_can_go_on_and_only_then(
    tmp_path: Path, step: str, environment: dict[str, str], code: int, requeued: bool
) -> None:
    ran = run(in_folder(script(), tmp_path).text, tmp_path, f"{CELL} {step}", **environment)
    assert (ran.code, ran.requeued) == (code, ["45"] if requeued else []), ran.output


def test_a_step_that_outlives_the_time_limit_is_queued_again_at_once(tmp_path: Path) -> None:
    text = in_folder(script(), tmp_path).text
    step = "kill -TERM $(ps -o ppid= -p $PPID); sleep 0.5; cp $FAKE/requeued $FAKE/already"  # srun's parent: the script
    ran = run(text, tmp_path, step, FAKE_STATE="COMPLETING TimeLimit")
    assert (ran.code, ran.requeued) == (0, ["45"]) and (tmp_path / "already").exists()


@pytest.mark.parametrize("state", ["COMPLETING None", "RUNNING None"])
def test_a_terminated_job_waits_for_its_step_otherwise(tmp_path: Path, state: str) -> None:
    text = in_folder(script(), tmp_path).text
    step = "kill -TERM $(ps -o ppid= -p $PPID); sleep 0.2; exit 3"
    ran = run(text, tmp_path, step, FAKE_STATE=state)
    assert (ran.code, ran.requeued) == (3, [])


@pytest.mark.parametrize("name", ["SQUEUE_PARTITION", "SQUEUE_USERS", "SCONTROL_LOCAL", "SLURM_CLUSTERS"])
def test_options_in_the_users_environment_do_not_hide_a_job_from_its_script(tmp_path: Path, name: str) -> None:
    ran = run(in_folder(script(), tmp_path).text, tmp_path, "echo ADDRESS=$MASTER_ADDR", **{name: "b300"})
    assert (ran.code, ran.requeued) == (0, ["45"]) and "ADDRESS=node1\n" in ran.output


def test_lines_that_a_sites_wrappers_print_are_passed_over(tmp_path: Path) -> None:
    text = in_folder(script(), tmp_path).text
    ran = run(text, tmp_path, "echo ADDRESS=$MASTER_ADDR", FAKE_BANNER="node42 is down until TimeLimit")
    assert (ran.code, ran.requeued) == (0, ["45"]) and "ADDRESS=node1\n" in ran.output


def test_usr2_to_the_script_is_passed_on_to_its_step_and_the_cell_is_queued_again(tmp_path: Path) -> None:
    text = in_folder(script(), tmp_path).text
    step = "kill -USR2 $(ps -o ppid= -p $PPID)"  # srun's parent: the script
    told = "for _ in {1..100}; do kill -0 $PPID || { touch $FAKE/told; break; }; sleep 0.1; done"
    ran = run(text, tmp_path, f"{step}; {told}")
    assert (ran.code, ran.requeued) == (0, ["45"]) and (tmp_path / "told").exists()


def test_of_an_array_only_the_element_itself_is_queued_again(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "45", "SLURM_ARRAY_TASK_ID": "1"}
    ran = run(in_folder(script("srun-gpu", setup=[]), tmp_path).text, tmp_path, "exit 0", **array)
    assert ran.requeued == ["45_1"]
    assert '"job": "45", "array_index": 1, "restart": 0' in (tmp_path / "out/tree-tp4/attempts.jsonl").read_text()


def test_a_cancelled_cell_does_not_start_again(tmp_path: Path) -> None:
    text = in_folder(script(), tmp_path).text
    (tmp_path / "out/tree-tp2/cancelled").touch()
    ran = run(text, tmp_path)
    assert (ran.code, ran.steps, ran.requeued) == (0, [], []) and "cancelled by tpcheck cancel" in ran.output


def test_a_start_beyond_the_last_retry_that_slurm_makes_by_itself_does_nothing(tmp_path: Path) -> None:
    ran = run(in_folder(script(), tmp_path).text, tmp_path, SLURM_RESTART_COUNT="11")
    assert (ran.code, ran.steps, ran.requeued) == (1, [], []) and "after 10 times" in ran.output


def test_a_setup_line_that_fails_ends_the_job(tmp_path: Path) -> None:
    text = in_folder(script(setup=["true", "false", "echo too far"]), tmp_path).text
    ran = run(text, tmp_path)
    assert ran.code == 1 and not ran.steps and "too far" not in ran.output


def test_every_start_has_a_port_of_its_own(tmp_path: Path) -> None:
    text = in_folder(script(), tmp_path).text
    ports = {_port(run(text, tmp_path, "echo PORT=$MASTER_PORT", SLURM_RESTART_COUNT=str(n))) for n in range(3)}
    assert len(ports) == 3 and all(20000 <= port < 32000 for port in ports)


def _port(ran: Ran) -> int:
    return int(ran.output.partition("PORT=")[2].split()[0])


def test_ranks_of_the_shell_that_submitted_are_forgotten(tmp_path: Path) -> None:
    text = in_folder(script(), tmp_path).text
    ran = run(
        text,
        tmp_path,
        'echo "[${RANK-none} ${WORLD_SIZE-none}]"',
        RANK="3",
        WORLD_SIZE="8",
    )
    assert "[none none]" in ran.output


def test_train_sbatch_does_a_run_with_nothing_but_environment_variables(tmp_path: Path) -> None:
    [path] = [path for path in SBATCH_FILES if path.name == "train.sbatch"]
    wanted = {"RUN": "my run.yaml", "OUTPUT": "re sults/x", "OVERRIDES": "tp=2 steps=5", "SRUN": "--cpu-bind=none"}
    wanted["CODE"] = str(ROOT)
    ran = run(path.read_text(), tmp_path, "exit 137", **wanted)
    assert ran.requeued == ["45"]
    [[_, *words]] = ran.steps
    rest = [
        "python",
        "-m",
        "tpcheck",
        "train",
        "my run.yaml",
        "tp=2",
        "steps=5",
        f"output={tmp_path}/re sults/x",
        "--resume",
    ]
    assert words == ["--label", "--export=ALL", "--kill-on-bad-exit=1", "--cpu-bind=none", *rest]


def test_sweep_sbatch_does_the_cell_of_its_place_in_the_array(tmp_path: Path) -> None:
    [path] = [path for path in SBATCH_FILES if path.name == "sweep.sbatch"]
    (tmp_path / "out" / "b").mkdir(parents=True)
    (tmp_path / "out" / "cells.txt").write_text("a\nb\n")
    sweep = {"OUTPUT": "out", "CODE": str(ROOT)}
    ran = run(path.read_text(), tmp_path, **sweep, SLURM_ARRAY_JOB_ID="44", SLURM_ARRAY_TASK_ID="1")
    assert ran.requeued == ["44_1"] and ran.steps[0][-2] == f"{tmp_path}/out/b/run.yaml"
    assert run(path.read_text(), tmp_path, **sweep, SLURM_ARRAY_TASK_ID="7").code != 0
    assert run(path.read_text(), tmp_path, **sweep, FIRST="1", SLURM_ARRAY_TASK_ID="0").steps[-1][-2] == (
        f"{tmp_path}/out/b/run.yaml"
    )


@pytest.mark.parametrize("path", SBATCH_FILES, ids=lambda path: path.name)
def test_the_output_of_plain_sbatch_does_not_change_the_clone_that_it_is_called_in(path: Path) -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", path.read_text(), re.MULTILINE))
    log = options["output"].replace("%x", options["job-name"])
    for pattern in ("%j", "%A", "%a"):
        log = log.replace(pattern, "45")
    done = subprocess.run(["git", "check-ignore", "--no-index", log], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a clone")
    assert "%" not in log and done.stdout.strip() == log


@pytest.mark.parametrize("path", SBATCH_FILES, ids=lambda path: path.name)
def test_what_a_script_misses_in_the_environment_it_says(tmp_path: Path, path: Path) -> None:
    ran = run(path.read_text(), tmp_path)
    assert ran.code != 0 and "OUTPUT=DIR" in ran.output and not ran.steps
