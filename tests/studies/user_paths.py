"""The six ways to `tpcheck compare`, each from the first run to the verdict: what `results/silent_bugs/paths.md` shows.

python -m tests.studies.user_paths [MEGATRON_LM]     minutes on two cores; DeepSpeed and transformers on the path

Two steps are traced. Times are processor seconds of all ranks, so that what else runs on the machine has no say.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import tpcheck
from tests.silent_bugs.__main__ import RESULTS
from tests.studies.megatron_lm_1736 import TP2, Script
from tests.support import hugging_face
from tests.support.ranks import on_ranks
from tpcheck.config.load import parse_run
from tpcheck.run.launch import launch
from tpcheck.trace.compare.command import compare

SIDES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32,
         "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 128}  # fmt: skip
MODEL = {"preset": "qwen3-tiny", "hidden_size": 256, "head_dim": 32, "ffn_hidden_size": 768, "vocab_size": 4096}
RUN = {"model": MODEL, "strategy": "stock", "layers": "local", "steps": 2, "seq_length": 128, "global_batch_size": 8}

# path of the trace, or none; what nudges the run; whether it is the other run
Train = Callable[[Path | None, int, bool], None]
TEXT = """Six ways to `tpcheck compare`, from the first run to the verdict, in processor seconds of all ranks on a CPU.

A Qwen3 of 4 layers, hidden size 256 and a vocabulary of 4096, 8 sequences of 128 tokens a step, two steps traced whole
(of `pretrain_gpt.py` the GPT of `results/megatron_lm_1736`, with its start-up). Five runs: A, A nudged three times, B.
Written by `tests/studies/user_paths.py`.
"""


class Times(NamedTuple):
    """Processor seconds; bytes."""

    title: str
    ranks: str
    untraced: float
    traced: float
    together: float
    compared: float
    size: int
    verdict: str


def main(megatron_lm: str | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tempfile.tempdir = scratch  # where untraced runs go
        rows = [timed(*path, folder / str(place)) for place, path in enumerate(paths(megatron_lm, folder))]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "paths.md").write_text(page(rows), encoding="utf-8")


def paths(megatron_lm: str | None, folder: Path) -> Iterator[tuple[str, str, Train]]:
    yield "a Megatron loop of one's own", "1, TP=2", own_loop
    if megatron_lm:
        script = Script(Path(megatron_lm).resolve(), folder)

        def pretrain(path: Path | None, perturb: int, other: bool) -> None:
            nudged = ["--perturb", str(perturb)] if perturb else []
            traced = ["--trace", str(path), *nudged] if path else []
            script.run(2 if other else 1, ["--strategy", "tree", *traced], TP2 if other else [])

        yield "`pretrain_gpt.py`, unmodified, under `tree`", "1, TP=2", pretrain
    yield "Hugging Face, DDP", "1, DP=2", lambda *run: on_ranks(1 + run[2], plain, *run[:2])
    yield "FSDP2", "1, DP=2", lambda *run: on_ranks(1 + run[2], sharded if run[2] else plain, *run[:2])
    yield "DeepSpeed, ZeRO 2", "1, DP=2", lambda *run: on_ranks(1 + run[2], deepspeed if run[2] else plain, *run[:2])
    yield "resumed after two of four steps", "1, 1", Resumed(folder / "resumed")


def place(path: Path, perturb: int) -> Path:
    """Where `compare` looks for the run in `path`, nudged or not."""
    return path / f"noise-{perturb}" if perturb else path


def own_loop(path: Path | None, perturb: int, other: bool) -> None:
    """`tpcheck train`, which is such a loop around `tpcheck.trace`."""
    trace = {"trace": {"steps": [0, 1], "perturb": perturb}} if path else {}
    output = place(path or Path(tempfile.mkdtemp()), perturb)
    assert launch(parse_run({**RUN, **trace, "tp": 2 if other else 1, "output": str(output)})) == 0


class Resumed:
    """Four steps, of which the last two are traced; the other run was stopped after two of them."""

    def __init__(self, folder: Path) -> None:
        self.stopped = folder
        assert launch(parse_run({**RUN, "steps": 4, "stop_after": 2, "output": str(folder)})) == 0

    def __call__(self, path: Path | None, perturb: int, other: bool) -> None:
        output = place(path or Path(tempfile.mkdtemp()), perturb)
        trace = {"trace": {"steps": [2, 3], "perturb": perturb}} if path else {}
        if other:
            shutil.copytree(self.stopped, output)
        settings = parse_run({**RUN, **trace, "steps": 4, "output": str(output)})
        assert launch(settings, resume=other) == 0


def plain(path: Path | None, perturb: int) -> None:
    model = hugging_face.language_model(**SIDES)
    if dist.get_world_size() > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    trained(path, perturb, model)


def sharded(path: Path | None, perturb: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    trained(path, perturb, fully_shard(hugging_face.language_model(**SIDES), mesh=mesh))


def trained(path: Path | None, perturb: int, model: Any) -> None:
    optimizer, x = torch.optim.AdamW(model.parameters(), lr=1e-2), samples()
    with tpcheck.trace(place(path, perturb), model, perturb=perturb) if path else contextlib.nullcontext():
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()


def deepspeed(path: Path | None, perturb: int) -> None:
    hugging_face.deepspeed_run(str(path), {"zero_optimization": {"stage": 2}}, x=samples(), **SIDES)


def samples() -> torch.Tensor:
    """This rank's of eight."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4096, (8, 128), generator=generator).chunk(dist.get_world_size())[dist.get_rank()]


def timed(title: str, ranks: str, train: Train, folder: Path) -> Times:
    a, b = folder / "a", folder / "b"
    untraced = _seconds(lambda: train(None, 0, False))
    traced = _seconds(lambda: train(a, 0, False))
    others = [_seconds(lambda seed=seed: train(a, seed, False)) for seed in (1, 2, 3)]
    other = _seconds(lambda: train(b, 0, True))
    found: list[str] = []
    compared = _seconds(lambda: found.append(compare(a, b).verdict))
    size = sum(file.stat().st_size for file in a.rglob("*") if file.is_file() and "noise-" not in str(file))
    times = Times(title, ranks, untraced, traced, traced + sum(others) + other, compared, size, found[0])
    print(times, flush=True)
    return times


def _seconds(call: Callable[[], object]) -> float:
    def now() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    before = now()
    call()
    return now() - before


def page(rows: Sequence[Times]) -> str:
    head = "| path | ranks of A, B | two steps, s | traced, s | all five runs, s | compare, s | a trace, MB | verdict |"
    lines = [
        f"| {row.title} | {row.ranks} | {row.untraced:.1f} | {row.traced:.1f} | {row.together:.1f} "
        f"| {row.compared:.1f} | {row.size / 1e6:.0f} | {row.verdict} |"
        for row in rows
    ]
    return "\n".join([TEXT, head, "| --- | --- |" + " ---: |" * 5 + " --- |", *lines, ""])


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(*(sys.argv[1:] or [None]))
