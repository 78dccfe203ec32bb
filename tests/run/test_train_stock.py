"""Whole runs of stock megatron-core on forked ranks: results, resuming at other layouts, signals and dead ranks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from tests.support import ROOT
from tests.support.ranks import on_ranks
from tests.support.waiting import wait_for
from tpcheck.config.load import parse_run
from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.lock import is_locked
from tpcheck.files.names import LOG
from tpcheck.run import heartbeat
from tpcheck.run.launch import launch
from tpcheck.run.place import place_from_environment
from tpcheck.run.resume import continued, resume_point

TINY = {"preset": "qwen3-tiny", "num_layers": 1, "hidden_size": 32, "head_dim": 4, "ffn_hidden_size": 40}
GPT2 = {"preset": "gpt2-124m", "num_layers": 1, "hidden_size": 32, "head_dim": 4, "ffn_hidden_size": 40}
GPT2 |= {"num_attention_heads": 8, "num_query_groups": 8, "vocab_size": 300, "max_positions": 32}


def run(output: Path, **settings: Any) -> RunConfig:
    defaults = {"model": TINY, "strategy": "stock", "seq_length": 16, "steps": 4, "output": str(output)}
    return parse_run(defaults | settings)


def digests(output: Path) -> tuple[str, str]:
    found = result_dir.read_digests(output)
    assert found is not None
    return found["model"], found["optimizer"]


@contextlib.contextmanager
def background(config: RunConfig, after_steps: int = 1) -> Iterator[tuple[int, Callable[[], int]]]:
    """`launch(config)` in a forked process, yielded once `after_steps` are on record: its pid, and a wait for it."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = launch(config)
        finally:
            os._exit(code)
    try:
        deadline = time.monotonic() + 60
        while len(result_dir.read_steps(Path(config.output))) < after_steps:
            assert time.monotonic() < deadline, "the run does not get under way"
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended before it got under way"
            time.sleep(0.05)
        yield pid, lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all of `processes` end within a minute; one that nobody has waited for yet counts as ended."""

    def alive(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + 60
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))


def test_run_leaves_a_complete_result_directory(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert launch(run(output, tp=2, sequence_parallel=True, recompute=True, checkpoint_every=2)) == 0
    manifest, steps = result_dir.read_manifest(output), result_dir.read_steps(output)
    assert parse_run(manifest["config"]) == run(
        output, tp=2, sequence_parallel=True, recompute=True, checkpoint_every=2
    )
    assert {"versions", "git", "hardware", "data", "patches", "started"} <= manifest.keys()
    assert len(manifest["data"]["digest"]) == 64
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(float.fromhex(row["loss_hex"]) == row["loss"] for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] < 7
    assert [step for step, _ in result_dir.checkpoints(output)] == [2, 4]
    assert (result_dir.read_digests(output) or {})["step"] == 4
    assert f"[0] complete: {output}" in (output / "log.txt").read_text()
    assert launch(run(output, tp=2, sequence_parallel=True, recompute=True, checkpoint_every=2), resume=True) == 0


@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"tp": 2, "dp": 2, "distributed_optimizer": True}, {"dtype": "fp32", "model": GPT2}]
)
def test_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path, layout: dict[str, Any]) -> None:
    assert launch(run(tmp_path / "whole", **layout)) == 0
    assert launch(run(tmp_path / "parts", stop_after=2, **layout)) == 0
    assert result_dir.read_digests(tmp_path / "parts") is None
    assert launch(run(tmp_path / "parts", **layout), resume=True) == 0
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert [row["loss_hex"] for row in result_dir.read_steps(tmp_path / "parts")] == [
        row["loss_hex"] for row in result_dir.read_steps(tmp_path / "whole")
    ]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_checkpoint_loads_exactly_with_and_without_the_distributed_optimizer(tmp_path: Path, dtype: str) -> None:
    """Without clipping, stock Megatron gives both the same bits, so a resume that mixes them must as well."""
    same = {"dtype": dtype, "optimizer": {"clip_grad": 0.0}, "tp": 2, "dp": 2}
    assert launch(run(tmp_path / "whole", **same)) == 0
    assert launch(run(tmp_path / "mixed", stop_after=1, distributed_optimizer=True, **same)) == 0
    assert launch(run(tmp_path / "mixed", stop_after=3, distributed_optimizer=False, **same), resume=True) == 0
    assert launch(run(tmp_path / "mixed", distributed_optimizer=True, **same), resume=True) == 0
    assert digests(tmp_path / "mixed")[0] == digests(tmp_path / "whole")[0]
    assert len(result_dir.read_manifest(tmp_path / "mixed")["history"]) == 2


def test_run_resumes_at_any_layout(tmp_path: Path) -> None:
    assert launch(run(tmp_path / "whole", dtype="fp32")) == 0
    layouts = [{"tp": 2}, {"tp": 8, "sequence_parallel": True}, {"dp": 2, "distributed_optimizer": True}, {"tp": 4}]
    for step, layout in enumerate(layouts, 1):
        assert launch(run(tmp_path / "parts", dtype="fp32", stop_after=step, **layout), resume=True) == 0
    whole, parts = (result_dir.read_steps(tmp_path / name) for name in ("whole", "parts"))
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    assert [row["grad_norm"] for row in parts] == pytest.approx([row["grad_norm"] for row in whole], rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_signal_saves_and_leaves_as_a_shell_says_it(tmp_path: Path, number: signal.Signals) -> None:
    with background(run(tmp_path / "run", tp=2, steps=10_000)) as (pid, wait):
        ranks = psutil.Process(pid).children(recursive=True)
        os.kill(pid, number)
        assert wait() == 128 + number
    assert gone(ranks)
    saved = result_dir.checkpoints(tmp_path / "run")[-1][0]
    assert [row["step"] for row in result_dir.read_steps(tmp_path / "run")][-1] == saved
    assert f"stopped and saved at step {saved}: go on with --resume" in (tmp_path / "run" / "log.txt").read_text()


def test_a_request_to_save_that_comes_before_anybody_can_hear_it_is_heard_after_the_first_step(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            os.kill(os.getpid(), signal.SIGUSR2)  # pending, as if it had come during the imports
            code = launch(run(tmp_path / "run", tp=2, steps=10_000))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGUSR2
    assert [step for step, _ in result_dir.checkpoints(tmp_path / "run")] == [1]


def test_signal_to_a_single_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    with background(run(tmp_path / "run", dp=2, steps=10_000)) as (pid, wait):
        psutil.Process(pid).children()[-1].send_signal(signal.SIGUSR2)
        assert wait() == 0
    assert result_dir.checkpoints(tmp_path / "run")


def test_killed_rank_ends_the_run_soon_and_is_named(tmp_path: Path) -> None:
    with background(run(tmp_path / "run", tp=4, steps=10_000)) as (pid, wait):
        ranks = psutil.Process(pid).children(recursive=True)
        began = time.monotonic()
        ranks[2].kill()
        assert wait() == 128 + signal.SIGKILL
        assert time.monotonic() - began < 30
    assert gone(ranks)
    assert "[launch] rank 2 was killed by SIGKILL" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("beside", ["a stopped rank", "a rank that waits for one"])
def test_sigterm_is_answered_whatever_ranks_do(tmp_path: Path, beside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one is found by its silence, the other by the step that does not end: each alone must be enough.
    monkeypatch.setattr(heartbeat, "HURRIED" if beside == "a rank that waits for one" else "PATIENCE", 1e9)
    saving = beside == "a stopped rank"  # a rank that waits for one to save together may wait for long
    config = run(tmp_path / "run", tp=2, steps=10_000, checkpoint_every=int(saving))
    with background(config) as (pid, wait):
        ranks = psutil.Process(pid).children(recursive=True)
        if saving:
            wait_for(lambda: result_dir.checkpoints(tmp_path / "run"), 200)
        ranks[1].suspend()
        time.sleep(2)
        began = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        assert wait() == (1 if saving else 128 + signal.SIGTERM)
        assert time.monotonic() - began < 200  # 30 s, on a machine that does nothing else
    assert gone(ranks)
    told = (tmp_path / "run" / "log.txt").read_text()
    assert ("gives no sign of life" if saving else "the step has not ended") in told


def test_a_rank_is_lost_after_its_silence_and_not_while_the_launcher_itself_stood_still() -> None:
    pulse = heartbeat.Pulse(2)
    for _ in range(10):
        pulse.beat(0)
        assert pulse.lost(0.05, is_stopping=False) == []  # however long the call took to come
    assert pulse.lost(heartbeat.HURRIED, is_stopping=False) == []
    pulse.beat(0)
    assert pulse.lost(heartbeat.HURRIED, is_stopping=True) == [1]
    assert pulse.lost(heartbeat.SILENCE, is_stopping=False) == [1]
    assert pulse.lost(heartbeat.SILENCE, is_stopping=False) == [0, 1]


def test_a_run_goes_on_when_its_reader_goes_away(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run(tmp_path / "run", tp=2).model_dump(mode="json")))
    command = [sys.executable, "-m", "tpcheck", "train", str(tmp_path / "run.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        process.stdout.close()
        assert process.wait(300) == 0
    assert result_dir.read_digests(tmp_path / "run")


def test_killed_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    with background(run(tmp_path / "run", tp=2, steps=10_000)) as (pid, _):
        ranks = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
        assert gone(ranks)


def test_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path: Path) -> None:
    assert launch(run(tmp_path / "whole", tp=2, steps=8)) == 0
    config = run(tmp_path / "killed", tp=2, steps=8, checkpoint_every=1)
    with background(config, after_steps=3) as (pid, _):
        ranks = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
        assert gone(ranks)
    # Also a process that a rank had forked for its checkpoint.
    wait_for(lambda: not is_locked(tmp_path / "killed" / LOG), what="the run's lock")
    unfinished = tmp_path / "killed" / "checkpoints" / ".new-step-00000007"
    unfinished.mkdir(parents=True, exist_ok=True)
    (unfinished / ".metadata").write_bytes(b"half a file")
    assert launch(config, resume=True) == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert sorted(os.listdir(unfinished.parent))[0] == "step-00000001"


def test_second_run_into_the_same_directory_is_refused(tmp_path: Path) -> None:
    config = run(tmp_path / "run", steps=10_000)
    with background(config), pytest.raises(TpcheckError, match="is being written by another run"):
        launch(config, resume=True)


def test_bad_input_that_a_rank_finds_is_raised_by_the_launcher(tmp_path: Path) -> None:
    model = {**TINY, "vocab_size": 100}
    corpus = _corpus(tmp_path)
    config = run(tmp_path / "run", model=model, tp=2, data={"kind": "megatron", "path": corpus})
    with pytest.raises(TpcheckError, match=r"model.vocab_size=100"):
        launch(config)


def _corpus(folder: Path) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{folder}/corpus.bin")
    builder.add_item(torch.arange(200))
    builder.end_document()
    builder.finalize(f"{folder}/corpus.idx")
    return f"{folder}/corpus"


def test_what_would_spoil_an_earlier_run_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert launch(run(output, stop_after=1)) == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    for config, resume, words in (
        (run(output), False, "holds a run already: go on with --resume"),
        (run(output, seed=5), True, "was trained with seed=1234, not 5"),
        (run(output, steps=9), True, "decay_steps"),
        (run(output, model=GPT2), True, "was trained with model="),
    ):
        with pytest.raises(TpcheckError, match=words):
            launch(config, resume)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


def test_a_manifest_keeps_what_computed_attention_where_no_step_is_left_to_run() -> None:
    now = {"data": {"digest": "d"}, "products": None, "attention": None}
    before = {**now, "config": {"strategy": "stock"}, "attention": "unfused"}
    assert continued(before, now, 3)["attention"] == "unfused"


def test_a_message_on_what_differs_stays_short(tmp_path: Path) -> None:
    config = run(tmp_path)
    result_dir.write_manifest(tmp_path, {"config": {**config.model_dump(mode="json"), "seed": 10**300}})
    with pytest.raises(TpcheckError, match="was trained with seed=1000") as caught:
        resume_point(config, resume=True)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    output, other = tmp_path / "run", tmp_path / "other"
    assert launch(run(output, stop_after=1)) == 0
    assert launch(run(other, model={**TINY, "hidden_size": 64}, stop_after=1)) == 0
    checkpoint = result_dir.checkpoint_path(output, 1)
    metadata = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(metadata[:100])
    with pytest.raises(TpcheckError, match="metadata"):
        launch(run(output), resume=True)
    shutil.rmtree(checkpoint)
    shutil.copytree(result_dir.checkpoint_path(other, 1), checkpoint)
    with pytest.raises(TpcheckError, match="does not load into this model"):
        launch(run(output), resume=True)


def test_ranks_are_not_forked_once_cuda_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(TpcheckError, match="torchrun --nproc-per-node=2 -m tpcheck train"):
        launch(run(tmp_path / "run", tp=2))


def test_rank_of_another_world_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(TpcheckError, match=r"4 ranks were started, tp \* pp \* dp = 2 \* 1 \* 1 needs 2"):
        place_from_environment(run(tmp_path / "run", tp=2))


def _mean_over_ranks(losses: torch.Tensor, microbatches: int) -> float:
    from megatron.core import parallel_state

    from patches import cpu
    from tpcheck.run.model import global_mean

    cpu.enable()
    parallel_state.initialize_model_parallel()
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return global_mean(list(losses.chunk(size)[rank].chunk(microbatches)))


def test_reported_loss_does_not_depend_on_ranks_and_microbatches() -> None:
    losses = torch.randn(8, 33, generator=torch.Generator().manual_seed(0)).exp()
    layouts = [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2)]
    means = {on_ranks(dp, _mean_over_ranks, losses, microbatches)[0] for dp, microbatches in layouts}
    assert len(means) == 1
    assert means.pop() == pytest.approx(losses.double().mean().item(), rel=1e-7)


def test_te_layers_are_refused_where_transformer_engine_is_missing(monkeypatch):
    from tpcheck.run import model

    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(TpcheckError, match="layers=te needs Transformer Engine.*use layers=local"):
        model.layers_of(parse_run({"layers": "te"}))
    assert model.layers_of(parse_run({})) == "local"
