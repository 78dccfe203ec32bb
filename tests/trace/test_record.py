"""`tpcheck.trace`: what is recorded, of which models, and that recording changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tpcheck
from tests.support.ranks import on_ranks
from tests.support.traces import TINY, recorded, traced
from tpcheck.config.load import parse_run
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.run.launch import launch
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.estimate import open_trace
from tpcheck.trace.compare.judge import Comparison
from tpcheck.trace.compare.logical import Key, Logical
from tpcheck.trace.compare.reader import Trace
from tpcheck.trace.module_names import canonical, layer_of, role_of
from tpcheck.trace.record import store


def test_recording_changes_no_bit_and_covers_everything(tmp_path: Path) -> None:
    run = traced(tmp_path / "traced", tp=2, sequence_parallel=True)
    plain = {"model": TINY, "strategy": "stock", "layers": "local", "steps": 2, "seq_length": 32}
    assert launch(parse_run({**plain, "tp": 2, "sequence_parallel": True, "output": str(tmp_path / "plain")})) == 0
    digests = [result_dir.read_digests(path) for path in (run, tmp_path / "plain")]
    assert digests[0] == digests[1]
    trace = open_trace(run)
    kinds = {key.kind for key in trace.order}
    assert kinds >= {"start", "input", "out", "dout", "din", "grad", "clip", "weight", "state.exp_avg", "state.main"}
    assert trace.steps == [0, 1]
    for key in trace.order:
        tensor = trace.logical(key)
        assert isinstance(tensor, Logical), (key, tensor)
        assert tensor.replicas is None, key
    assert trace.logical(Key(0, "out", "decoder.layers.1.mlp.linear_fc1")).bits.shape == (32, 4, 144)
    assert trace.logical(Key(1, "grad", "decoder.layers.0.self_attention.linear_qkv.weight")).bits.shape == (192, 64)


def test_execution_order_is_forward_then_backward_then_gradients(tmp_path: Path) -> None:
    keys = open_trace(traced(tmp_path / "run", trace={"steps": [0]}, steps=1)).keys()
    place = {(key.kind, key.name): number for number, key in enumerate(keys)}
    layer = "decoder.layers.0"
    order = [
        ("start", f"{layer}.mlp.linear_fc1.weight"), ("out", "embedding.word_embeddings"),
        ("out", f"{layer}.mlp.linear_fc1"), ("out", f"{layer}.mlp.linear_fc2"), ("out", f"{layer}"), ("out", "model"),
        ("dout", "model"), ("din", "output_layer"), ("dout", f"{layer}.mlp.linear_fc2"),
        ("din", f"{layer}.mlp.linear_fc1"), ("dout", f"{layer}.self_attention.linear_qkv"),
        ("grad", "embedding.word_embeddings.weight"), ("clip", "gradient clipping"),
        ("state.exp_avg", "output_layer.weight"), ("weight", "output_layer.weight"),
    ]  # fmt: skip
    assert [place[entry] for entry in order] == sorted(place[entry] for entry in order)


def test_filters_sampling_and_small_files_keep_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_trace(traced(tmp_path / "whole", steps=1, trace={"steps": [0]}))
    monkeypatch.setattr(store, "FILE_BYTES", 10_000)
    few = {"steps": [0], "modules": ["*.linear_fc1*"], "kinds": ["out", "grad"], "sample": 3}
    part = open_trace(traced(tmp_path / "part", steps=1, trace=few, tp=2, sequence_parallel=True, strategy="tree"))
    assert len(list((tmp_path / "part/trace/rank-00000").glob("*.safetensors"))) > 1
    assert {key.kind for key in part.order} == {"out", "grad"}
    again = open_trace(traced(tmp_path / "tree", steps=1, trace={"steps": [0]}, strategy="tree"))
    for key in part.order:
        assert "linear_fc1" in key.name
        full, sampled = again.logical(key), part.logical(key)
        dim = max(range(full.bits.ndim), key=lambda dim: full.bits.shape[dim] if dim != full.batch else 0)
        assert (full.bits[(slice(None),) * dim + (slice(None, None, 3),)] == sampled.bits).all()
    assert whole.order.keys() == again.order.keys()


def test_the_same_folder_twice_is_refused_also_to_a_resumed_run(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with tpcheck.trace(tmp_path / "trace", model):
        pass
    with pytest.raises(TpcheckError, match="a trace already"), tpcheck.trace(tmp_path / "trace", model):
        pass
    traced(tmp_path / "run", steps=2, stop_after=1)
    settings = json.loads((tmp_path / "run/manifest.json").read_text())["config"]
    with pytest.raises(TpcheckError, match="a trace already"):
        launch(parse_run({**settings, "stop_after": None}), resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, r"steps=3: name them by numbers from 0, as in steps=\[0, 1\]"),
        ({"steps": [-1]}, "numbers from 0"),
        ({"kinds": ["output"]}, r"kinds=\['output'\]: use some of settings, start, resumed, input, in, out,"),
        ({"modules": "decoder.*"}, r"use a list, \['decoder.\*'\]"),
        ({"sample": 0}, "sample=0: use a number from 1"),
        ({"perturb": -1}, "perturb=-1: use 0, or a seed"),
        ({"step": [0]}, "no option step: it has steps, modules, kinds, sample, perturb"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TpcheckError, match=message), tpcheck.trace(tmp_path / "trace", nn.Linear(3, 2), **options):
        pass
    with pytest.raises(TpcheckError, match="2 models cannot be traced"), tpcheck.trace(tmp_path / "t", [Net(), Net()]):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ({"steps": [-1]}, r"trace.steps: steps=\[-1\]: name them"),
        ({"steps": [2, 3]}, r"^run: trace.steps=\[2, 3\]: the last of steps=2 is 1"),
        ({"steps": [0], "sampel": 2}, "unknown key trace.sampel: did you mean sample"),
        ({"sample": 2}, "trace.steps is missing: give it$"),
    ],
)
def test_trace_settings_of_a_run_file_that_make_no_sense_are_refused(trace: dict[str, Any], message: str) -> None:
    with pytest.raises(TpcheckError, match=message):
        parse_run({"steps": 2, "trace": trace})


@pytest.mark.parametrize("perturb", [0, 1])
def test_a_backward_pass_after_the_end_is_neither_recorded_nor_nudged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, perturb: int
) -> None:
    monkeypatch.setattr(store, "FILE_BYTES", 1)
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with tpcheck.trace(tmp_path / "trace", model, perturb=perturb):
        y = model(x)
    files = sorted((tmp_path / "trace/rank-00000").iterdir())
    gradient = torch.randn(4, 2)
    y.backward(gradient)
    assert sorted((tmp_path / "trace/rank-00000").iterdir()) == files
    assert open_trace(tmp_path / "trace").order
    assert torch.equal(model.bias.grad, gradient.sum(0))


def test_a_list_that_a_module_returns_is_handed_on_itself(tmp_path: Path) -> None:
    class Kept(nn.Module):
        kept = [torch.ones(2), None]  # noqa: RUF012

        def forward(self, x: torch.Tensor) -> list[Any]:
            return self.kept

    model = Kept()
    with tpcheck.trace(tmp_path / "trace", model):
        assert model(torch.ones(2, 2)) is model.kept


class Net(nn.Module):
    """Knows nothing of Megatron; its second layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(self.norm(x))))
        return {"y": x}


def _train(path: Path, model: nn.Module, x: torch.Tensor, perturb: int = 0, steps: int = 2) -> None:
    def loss() -> torch.Tensor:
        with torch.no_grad():
            model(x)  # an evaluation, not to be recorded
        return model(x)["y"].pow(2).mean()

    recorded(path, model, loss, lr=1e-2, steps=steps, perturb=perturb)


def _plain_or_ddp(path: str, scaled: bool = False) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    model: Any = Net()
    rank, size = dist.get_rank(), dist.get_world_size()
    if size > 1:
        model = DistributedDataParallel(model)
        if scaled:
            model.register_comm_hook(None, _summed)
    _train(Path(path), model, x.chunk(size)[rank])
    if size == 1:
        for seed in (1, 2, 3):
            torch.manual_seed(0)
            torch.randn(4, 5, 8)
            _train(Path(path, f"noise-{seed}"), Net(), x, perturb=seed)


def _summed(state: Any, bucket: Any) -> Any:
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


_summed.__annotations__.clear()  # as strings, DDP does not take them


def rounding(a: Path, b: Path) -> Comparison:
    """The judgement of `b` by `a`, which must be that nothing but rounding differs."""
    found = compare(a, b)
    assert found.verdict in ("identical", "rounding"), found.first
    assert not found.unmapped
    return found


def test_ddp_of_any_model_is_rounding_and_a_sum_instead_of_a_mean_is_not(tmp_path: Path) -> None:
    on_ranks(1, _plain_or_ddp, str(tmp_path / "one"))
    on_ranks(2, _plain_or_ddp, str(tmp_path / "two"))
    found = rounding(tmp_path / "one", tmp_path / "two")
    keys = {(row.key.kind, row.key.name) for row in found.rows}
    assert {("out", "up"), ("out", "up#1"), ("dout", "down#1"), ("grad", "norm.bias"), ("out", "model")} <= keys
    on_ranks(2, _plain_or_ddp, str(tmp_path / "sum"), True)
    wrong = compare(tmp_path / "one", tmp_path / "sum").first
    assert wrong is not None and wrong.key.kind == "grad" and "scaled by 2 = DP" in wrong.why


def _tensor_parallel(path: str, broken: bool = False) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = parallelize_module(Net(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if broken and dist.get_rank() == 1:
        with torch.no_grad():
            model.up.weight.to_local().mul_(1.5)
    _train(Path(path), model, x)


def test_dtensor_tensor_parallelism_is_mapped_by_its_placements(tmp_path: Path) -> None:
    on_ranks(1, _plain_or_ddp, str(tmp_path / "one"))
    on_ranks(2, _tensor_parallel, str(tmp_path / "tp"))
    rounding(tmp_path / "one", tmp_path / "tp")
    on_ranks(2, _tensor_parallel, str(tmp_path / "broken"), True)
    wrong = compare(tmp_path / "one", tmp_path / "broken").first
    assert wrong is not None and (wrong.key.kind, wrong.key.name) == ("start", "up.weight")
    assert "only what ranks 1 hold is wrong: scaled by 1.5" in wrong.why


def test_an_exception_leaves_an_unfinished_trace_and_no_hooks(tmp_path: Path) -> None:
    model = Net()
    dropout = torch.nn.functional.dropout
    with pytest.raises(RuntimeError, match="shape"), tpcheck.trace(tmp_path / "trace", model):
        model(torch.randn(2, 3, 7))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.nn.functional.dropout is dropout
    with pytest.raises(TpcheckError, match="rank 0 was cut short"):
        Trace(tmp_path / "trace")


def test_names() -> None:
    assert canonical("module.module.decoder.layers.3.mlp.linear_fc2") == "decoder.layers.3.mlp.linear_fc2"
    assert canonical("_fsdp_wrapped_module.layers.0._orig_mod.up") == "layers.0.up"
    assert canonical("module") == ""
    fused = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    assert canonical(fused) == "decoder.layers.1.pre_mlp_layernorm.weight"
    assert layer_of(fused) == 1
    assert layer_of("embedding.word_embeddings") is None
    assert role_of("decoder.layers.11.mlp") == "decoder.layers.*.mlp"


def _fully_sharded(path: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    model = fully_shard(Net(), mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",)))
    _train(Path(path), model, x.chunk(dist.get_world_size())[dist.get_rank()])


def test_fsdp_is_rounding_away_from_one_rank(tmp_path: Path) -> None:
    on_ranks(1, _plain_or_ddp, str(tmp_path / "one"))
    on_ranks(2, _fully_sharded, str(tmp_path / "fsdp"))
    found = rounding(tmp_path / "one", tmp_path / "fsdp")
    assert {"start", "grad", "state.exp_avg", "weight", "dout"} <= {row.key.kind for row in found.rows}
