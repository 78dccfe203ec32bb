"""Traces of pipelines, of several model chunks on a rank, and of multi-token prediction, on megatron-core."""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

import tpcheck
from patches import cpu
from tests.support.ranks import on_ranks
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.estimate import open_trace
from tpcheck.trace.compare.reader import Trace
from tpcheck.trace.record.chunks import chunks_of
from tpcheck.trace.record.rank_layout import rank_layout_of

cpu.enable()
VOCABULARY, LENGTH, MICROBATCHES, STEPS = 48, 8, 4, 2


def train(
    path: str, tp: int = 1, pp: int = 1, chunks: int = 1, mtp: int = 0, perturb: int = 0, tied: bool = True,
    bug: bool = False, **settings: Any,
) -> None:  # fmt: skip
    """Trace two steps of a model of four layers, `chunks` of them on every rank of a pipeline."""
    virtual = chunks if chunks > 1 else None
    parallel_state.initialize_model_parallel(tp, pp, virtual)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=4, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24, use_cpu_initialization=True,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=tp > 1, pipeline_dtype=torch.float32, hidden_dropout=0.0, attention_dropout=0.0,
        mtp_num_layers=mtp or None, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, overlap_p2p_comm=chunks > 1, batch_p2p_comm=chunks == 1,
        apply_rope_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        finalize_model_grads_func=finalize_model_grads, **settings,
    )  # fmt: skip
    models = [_chunk(config, stage if virtual else None, mtp, tied) for stage in range(chunks)]
    _initialize(models)
    if bug and parallel_state.get_pipeline_model_parallel_rank() == pp - 1:
        layer = next(layer for layer in models[-1].module.decoder.layers if layer.layer_number == 4)
        layer.input_layernorm.eps = 0.1
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.1), models)
    with tpcheck.trace(path, models, perturb=perturb):
        for step in range(STEPS):
            for model in models:
                model.zero_grad_buffer()
            optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=_forward, data_iterator=[_batches(step) for _ in models], model=models,
                num_microbatches=MICROBATCHES, seq_length=LENGTH, micro_batch_size=2, forward_only=False,
            )  # fmt: skip
            optimizer.step()
    parallel_state.destroy_model_parallel()


def _chunk(config: TransformerConfig, virtual: int | None, mtp: int, tied: bool) -> Any:
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=virtual is None, vp_stage=virtual)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=virtual is None, vp_stage=virtual)
    spec = get_gpt_layer_local_spec()
    predictors = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if mtp and last else None
    model = GPTModel(
        config, spec, VOCABULARY, LENGTH, pre_process=first, post_process=last, vp_stage=virtual,
        mtp_block_spec=predictors, share_embeddings_and_output_weights=tied, position_embedding_type="rope",
    )  # fmt: skip
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def _initialize(models: list[Any]) -> None:
    """Weights by their names in the whole model, whoever holds them."""
    layout = rank_layout_of(models)
    for chunk in chunks_of(models, layout):
        for name, parameter in chunk.parameters().items():
            if parameter.dim() < 2:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            cut = getattr(parameter, "tensor_model_parallel", False)
            shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", 0)
            shape[dim] *= layout.tp if cut else 1
            drawn = torch.randn(shape, generator=generator) / 10
            parameter.data.copy_(drawn.chunk(layout.tp, dim)[layout.tp_rank] if cut else drawn)


def _batches(step: int) -> Any:
    return iter(
        torch.randint(0, VOCABULARY, (MICROBATCHES, 2, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    )


def _forward(iterator: Any, model: Any) -> Any:
    tokens = next(iterator)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return model(x, torch.arange(LENGTH).expand_as(x), None, labels=y), partial(_loss)


def _loss(losses: torch.Tensor) -> Any:
    return losses.mean(), {"loss": losses.detach().mean()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _reference(tmp_path_factory.mktemp("pipeline") / "a")


def _reference(path: Path, **options: Any) -> Path:
    on_ranks(1, partial(train, **options), str(path))
    for seed in (1, 2, 3):
        on_ranks(1, partial(train, perturb=seed, **options), str(path / f"noise-{seed}"))
    return path


@pytest.mark.parametrize(("ranks", "layout"), [(2, {"pp": 2}), (2, {"pp": 2, "chunks": 2}), (4, {"pp": 2, "tp": 2})])
def test_a_pipeline_is_rounding_away_from_one_rank_and_nothing_is_left_out(
    reference: Path, tmp_path: Path, ranks: int, layout: dict[str, int]
) -> None:
    on_ranks(ranks, partial(train, **layout), str(tmp_path / "b"))
    found = compare(reference, tmp_path / "b")
    assert found.verdict in ("identical", "rounding"), found.first
    assert not found.unmapped
    assert {row.key for row in found.rows} >= set(Trace(reference).order)
    assert found.b.pp == 2


def test_stages_are_in_the_order_of_the_model_forward_and_backward(tmp_path: Path) -> None:
    on_ranks(2, partial(train, pp=2, chunks=2), str(tmp_path / "b"))
    in_order = open_trace(tmp_path / "b").keys()
    keys = [key for key in in_order if key.step == 0]
    layers = [f"decoder.layers.{number}" for number in range(4)]
    forward = [key.name for key in keys if key.kind == "out" and key.name in layers]
    backward = [key.name for key in keys if key.kind == "dout" and key.name in layers]
    assert forward == layers and backward == layers[::-1]


def test_a_bug_in_the_last_stage_is_named_by_the_number_of_its_layer(reference: Path, tmp_path: Path) -> None:
    on_ranks(2, partial(train, pp=2, chunks=2, bug=True), str(tmp_path / "b"))
    found = compare(reference, tmp_path / "b")
    assert found.first is not None and found.first.key.name == "eps decoder.layers.3.input_layernorm"
    tensor = next(row for row in found.rows if row.verdict == "suspect" and row.key.kind != "settings")
    assert tensor.key.name == "decoder.layers.3.input_layernorm"


@pytest.mark.parametrize(("ranks", "layout"), [(2, {"tp": 2}), (2, {"pp": 2})])
def test_multi_token_prediction_is_traced(tmp_path: Path, ranks: int, layout: dict[str, int]) -> None:
    path = _reference(tmp_path / "a", mtp=1, tied=False)
    assert any(key.name.startswith("mtp.layers.0.") and key.kind == "dout" for key in open_trace(path).order)
    on_ranks(ranks, partial(train, mtp=1, tied=False, **layout), str(tmp_path / "b"))
    found = compare(path, tmp_path / "b")
    assert found.verdict in ("identical", "rounding"), found.first
    assert not [note for note in found.unmapped if "embedding" not in note]


def test_recomputation_in_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="recompute_granularity=full in a pipeline of 2 is not traced"):
        on_ranks(
            2, partial(train, pp=2, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
            str(tmp_path / "b"),
        )  # fmt: skip
