"""`tpcheck compare`: clean runs are rounding at every layout, bugs are suspect in the right module."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from patches import cpu
from tests.support.traces import GPT2, TINY, Runs, replaced
from tpcheck.cli import main
from tpcheck.files.names import RECORDS
from tpcheck.trace.compare.command import compare, to_json
from tpcheck.trace.compare.text import sentence
from tpcheck.trace.record.store import rank_folder

cpu.enable()
NO_BUG = contextlib.nullcontext()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("traces"))


CLEAN = [
    ({}, {"tp": 4, "sequence_parallel": True}),
    ({}, {"tp": 2, "dp": 2, "sequence_parallel": True, "distributed_optimizer": True}),
    ({}, {"tp": 2, "recompute": True, "micro_batch_size": 1}),
    ({"dtype": "fp32"}, {"tp": 4, "sequence_parallel": True}),
    # A float32 norm of so many elements misses 1e-5 of it on a CPU, and so does the clip coefficient.
    ({"dtype": "fp32", "model": {**GPT2, "vocab_size": 20000}, "optimizer": {"clip_grad": 0.05}}, {"tp": 2}),
]
MORE_CLEAN = [
    ({}, {"tp": 2}),
    ({"dtype": "fp32", "seed": 7}, {"tp": 2, "dp": 2, "distributed_optimizer": True}),
    ({"model": {**TINY, "num_query_groups": 2}}, {"tp": 4}),
    ({"model": {**TINY, "tied": True}, "dtype": "fp32"}, {"tp": 4, "sequence_parallel": True}),
    ({"model": GPT2}, {"tp": 4, "sequence_parallel": True}),
    ({"model": GPT2}, {"tp": 2, "dp": 2, "sequence_parallel": True, "distributed_optimizer": True}),
    ({"model": GPT2, "dtype": "fp32", "seed": 3}, {"tp": 4, "recompute": True}),
    ({"model": {**TINY, "num_layers": 12}}, {"tp": 4}),
    ({"seed": 11}, {"dp": 2, "micro_batch_size": 1}),
]


@pytest.mark.parametrize(
    ("settings", "layout"), [*CLEAN, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CLEAN)]
)
def test_clean_runs_differ_by_rounding_only(runs: Runs, settings: dict[str, Any], layout: dict[str, Any]) -> None:
    found = runs.judge(layout, NO_BUG, **settings)
    assert found.verdict in ("identical", "rounding"), found.first
    assert not found.unmapped
    worst = max(row.excess for row in found.rows if row.verdict == "rounding") if found.verdict == "rounding" else 0
    assert worst < 0.7
    assert all(row.verdict == "identical" for row in found.rows if row.key.kind in ("start", "input"))


def _without_dgrad_reduction() -> contextlib.AbstractContextManager[None]:
    cls = layers.LinearWithGradAccumulationAndAsyncCommunication
    original = cls.backward

    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.allreduce_dgrad = ctx.allreduce_dgrad and ctx.saved_tensors[1].shape[0] != 96  # linear_qkv's at TP=2
        return original(ctx, gradient)

    return replaced(cls, "backward", staticmethod(backward))


def _without_norm_reduction() -> contextlib.AbstractContextManager[None]:
    import sys

    finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]
    return replaced(finalize, "_allreduce_non_tensor_model_parallel_grads", lambda *args, **kwargs: None)


def _forward_reduction_doubled() -> contextlib.AbstractContextManager[None]:
    original = layers.reduce_from_tensor_model_parallel_region
    return replaced(layers, "reduce_from_tensor_model_parallel_region", lambda x, **kwargs: original(original(x)))


def _local_gradient_norm() -> contextlib.AbstractContextManager[None]:
    from megatron.core.optimizer import optimizer

    def local(grads: list[torch.Tensor], *args: Any, **kwargs: Any) -> float:
        return float(torch.stack([gradient.norm() for gradient in grads]).norm())

    return replaced(optimizer, "get_grad_norm_fp32", local)


def _gradients_doubled_by_dp() -> contextlib.AbstractContextManager[None]:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    original = Group.finish_grad_sync

    def finish(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for bucket in self.buckets:
            bucket.grad_data.mul_(parallel_state.get_data_parallel_world_size())

    return replaced(Group, "finish_grad_sync", finish)


def _larger_norm_epsilon() -> contextlib.AbstractContextManager[None]:
    new = WrappedTorchNorm.__new__

    def with_epsilon(cls: Any, config: Any, hidden_size: int, eps: float = 0.0, **options: Any) -> Any:
        return new(cls, config, hidden_size, eps=1e-5, **options)

    return replaced(WrappedTorchNorm, "__new__", staticmethod(with_epsilon))


def _weights_not_copied() -> contextlib.AbstractContextManager[None]:
    return replaced(Float16OptimizerWithFloat16Params, "_copy_main_params_to_model_params", lambda self: None)


BUGS = [
    ("bf16", _without_dgrad_reduction, {"tp": 2}, "self_attention.linear_qkv", "din", "a reduction is missing"),
    (
        "fp32",
        _without_norm_reduction,
        {"tp": 2, "sequence_parallel": True},
        "input_layernorm.weight",
        "grad",
        "missing",
    ),
    ("bf16", _without_norm_reduction, {"tp": 2}, "q_layernorm.weight", "grad", "adds up to A"),
    ("fp32", _forward_reduction_doubled, {"tp": 2}, "embedding.word_embeddings", "out", "scaled by 2 = TP"),
    ("bf16", _local_gradient_norm, {"tp": 2}, "gradient norm", "clip", "unequal replicas"),
    ("fp32", _gradients_doubled_by_dp, {"dp": 2}, "embedding.word_embeddings.weight", "grad", "scaled by 2 = DP"),
    ("bf16", _larger_norm_epsilon, {}, "input_layernorm", "settings", "epsilon: 1e-05 in B, 1e-06 in A"),
    ("bf16", _weights_not_copied, {}, "word_embeddings.weight", "weight", "are not their main parameters, rounded"),
]


@pytest.mark.parametrize(("dtype", "bug", "layout", "module", "kind", "words"), BUGS)
def test_bugs_are_suspect_in_the_right_module(
    runs: Runs, dtype: str, bug: Any, layout: dict[str, Any], module: str, kind: str, words: str
) -> None:
    found = runs.judge(layout, bug(), **({"dtype": dtype} if dtype == "fp32" else {}))
    assert found.first is not None
    assert (found.first.key.kind, found.first.key.step) == (kind, 0)
    assert found.first.key.name.endswith(module), found.first
    assert words in found.first.why


def test_a_run_is_identical_to_itself_and_json_says_so(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    reference = str(runs.reference())
    assert main(["compare", reference, reference, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "identical"
    assert {row["verdict"] for row in found["tensors"]} == {"identical"}


def test_suspect_runs_exit_with_one_and_name_the_module(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    with _forward_reduction_doubled():
        other = runs.run(tp=2)
    assert main(["compare", str(runs.reference()), str(other)]) == 1
    printed = capsys.readouterr().out
    assert "suspect: embedding.word_embeddings (output, step 0) is off by 1" in printed
    assert "first that differs  embedding.word_embeddings" in printed
    json.dumps(to_json(compare(runs.reference(), other)), allow_nan=False)


def test_without_nudged_runs_it_cannot_tell(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, other = runs.reference(), runs.run(tp=2)
    shutil.copytree(reference / "trace", tmp_path / "bare")
    assert main(["compare", str(tmp_path / "bare"), str(other)]) == 2
    assert "trace A again into its folders noise-1, noise-2, noise-3" in capsys.readouterr().out


class TestDropout:
    """What is dropped depends on the TP size, rightly; what must be equal or different between ranks does not."""

    SETTINGS: ClassVar[dict[str, Any]] = {"model": {**TINY, "dropout": 0.1}, "steps": 1, "trace": {"steps": [0]}}

    def test_a_clean_run_is_judged_by_runs_that_redraw_it(self, runs: Runs) -> None:
        found = runs.judge({"tp": 2}, NO_BUG, **self.SETTINGS)
        assert found.verdict == "rounding" and not found.unmapped
        assert "everything is judged by runs of A that drop others, too" in found.notes[0]

    def test_without_such_runs_it_cannot_be_told(self, runs: Runs, tmp_path: Path) -> None:
        without = shutil.ignore_patterns("noise-101", "noise-102", "noise-103")
        shutil.copytree(runs.reference(**self.SETTINGS), tmp_path / "a", ignore=without)
        found = compare(tmp_path / "a", runs.run(tp=2, **self.SETTINGS))
        assert found.verdict == "unknown"
        # The embedding is dropped by a generator that all layouts seed alike.
        first = "decoder.layers.0.self_attention.core_attention.attention_dropout"
        assert sentence(found).startswith(f"can't tell: {first} dropout (what is dropped, step 0)")
        assert sentence(found).endswith("Trace both runs with dropout 0")

    def test_equal_seeds_where_they_must_differ_are_suspect(self, runs: Runs) -> None:
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        bug = replaced(CudaRNGStatesTracker, "fork", lambda self, name="": contextlib.nullcontext())
        found = runs.judge({"tp": 2}, bug, **self.SETTINGS)
        assert found.first is not None
        assert found.first.key.name == "decoder.layers.0.self_attention.core_attention.attention_dropout dropout"
        assert "drop the same elements of different shards" in found.first.why

    def test_different_seeds_where_they_must_be_equal_are_suspect(self, runs: Runs) -> None:
        from tpcheck.run import train

        original = train.build_optimizer

        def build(*args: Any) -> Any:
            torch.manual_seed(parallel_state.get_tensor_model_parallel_rank())
            return original(*args)

        @contextlib.contextmanager
        def apart() -> Iterator[None]:
            with replaced(train, "seed_everything", lambda seed: None), replaced(train, "build_optimizer", build):
                yield

        found = runs.judge({"tp": 2}, apart(), **self.SETTINGS)
        assert found.first is not None
        assert found.first.key.name == "embedding.embedding_dropout dropout"
        assert "unequal replicas in B" in found.first.why


class TestBadInput:
    def refused(self, a: Path, b: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()  # what making a reference has said
        assert main(["compare", str(a), str(b)]) == 2
        message = capsys.readouterr().err.splitlines()
        assert len(message) == 1
        assert words in message[0]

    def test_other_models_dtypes_and_steps(self, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
        a = runs.reference()
        self.refused(a, runs.reference(dtype="fp32"), "A computes in bfloat16, B in float32", capsys)
        wider = runs.run(model={**TINY, "hidden_size": 128}, steps=1, trace={"steps": [0]})
        self.refused(a, wider, "different models: decoder.", capsys)
        self.refused(a, runs.run(steps=3, trace={"steps": [2]}), "A has steps [0, 1], B has [2]", capsys)
        self.refused(a, runs.run(steps=1, trace={"steps": [0], "sample": 2}), "every 2th", capsys)

    def test_missing_ranks_and_files(self, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        a, b = runs.reference(), tmp_path / "b"
        self.refused(a, b, f"{b}: ", capsys)
        b.mkdir()
        self.refused(a, b, "is not a trace", capsys)
        shutil.rmtree(b)
        shutil.copytree(runs.run(tp=2) / "trace", b)
        rank = rank_folder(b, 1)
        tensors = rank / "000000.safetensors"
        whole, lines = tensors.read_bytes(), (rank / RECORDS).read_text()
        tensors.write_bytes(whole[:-100])
        self.refused(a, b, "cut short or damaged", capsys)
        tensors.write_bytes(b"\xff" * 40)
        self.refused(a, b, "cut short or damaged", capsys)
        tensors.unlink()
        self.refused(a, b, "cannot read", capsys)
        tensors.write_bytes(whole)
        (rank / RECORDS).write_text("\n".join(lines.splitlines()[:-3]))
        self.refused(a, b, "records where", capsys)
        (rank / RECORDS).write_text(lines.replace('"kind"', '"king"', 1))
        self.refused(a, b, "records.jsonl:", capsys)
        description = json.loads((rank / "rank.json").read_text())
        (rank / "rank.json").write_text(json.dumps({k: v for k, v in description.items() if k != "records"}))
        self.refused(a, b, "rank 1 was cut short", capsys)
        (rank / "rank.json").write_text("{")
        self.refused(a, b, "is not JSON", capsys)
        shutil.rmtree(rank)
        self.refused(a, b, "lacks rank 1", capsys)
