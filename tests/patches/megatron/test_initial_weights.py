"""Initial weights follow from the seed and their names, whatever was drawn before, and at every TP size."""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

import patches
from patches.megatron.first_step import require_agreement
from patches.registry import REGISTRY, check_versions
from tests.support import STAND_IN, plain_megatron
from tests.support.plain_megatron import GPT2, QWEN3, SHARED, digest, whole
from tests.support.ranks import on_ranks


def config(tp: int, **settings: Any) -> TransformerConfig:
    return TransformerConfig(**{**SHARED, **settings}, tensor_model_parallel_size=tp)


def gpt(tp: int, shape: dict[str, Any], first_stage: bool = True, **settings: Any) -> torch.nn.Module:
    spec = get_gpt_layer_local_spec(qk_layernorm=shape is QWEN3, normalization=shape["normalization"])
    positions = "rope" if shape is QWEN3 else "learned_absolute"
    return GPTModel(
        config(tp, **{**shape, **settings}), spec, 200, 24, position_embedding_type=positions, pre_process=first_stage
    )


def bert(tp: int) -> torch.nn.Module:
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    return BertModel(config(tp, **GPT2), 2, bert_layer_local_spec, 200, 24)


def t5(tp: int) -> torch.nn.Module:
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.models.T5.t5_spec import get_t5_decoder_with_local_block_spec as decoder
    from megatron.core.models.T5.t5_spec import get_t5_encoder_with_local_block_spec as encoder

    settings = config(tp, **GPT2)
    return T5Model(settings, settings, encoder(1).layer_specs[0], decoder(1).layer_specs[0], 200, 24)


HAS_T5 = Version(version("megatron-core")) >= Version("0.16")  # before, its local layers want Transformer Engine
PATCHES = [patch for patch in patches._all_patches() if patch.library == "megatron-core"]
MODELS: dict[str, Any] = {
    "qwen3": lambda tp: gpt(tp, QWEN3),
    "qwen3 on the device": lambda tp: gpt(tp, QWEN3, use_cpu_initialization=False),
    "gpt-2 shape": lambda tp: gpt(tp, GPT2),
    "without an embedding": lambda tp: gpt(tp, QWEN3, first_stage=False),
    "bert": bert,
    **({"t5": t5} if HAS_T5 else {}),
}


def built(name: str, without: tuple[str, ...] = (), seed: int = 1234) -> dict[str, str]:
    """Digests of the weights of the model `name`, after a warm-up in shapes that TP cuts."""
    tp = torch.distributed.get_world_size()
    patches.cpu.enable()
    REGISTRY.apply(patches.Contract(), [patch for patch in check_versions(PATCHES) if patch.name not in without])
    sys.path.insert(0, str(STAND_IN))
    from megatron.training import initialize

    parallel_state.initialize_model_parallel(tp)
    initialize._set_random_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    initialize._warmup_jit_function(SimpleNamespace(tensor_model_parallel_size=tp, ffn_hidden_size=72, seq_length=24))
    before = torch.get_rng_state()
    model = MODELS[name](tp)
    assert without or torch.equal(torch.get_rng_state(), before), "building a model moved the generator"
    return {key: digest({key: whole(p, p.data)}) for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_same_at_every_tp(name: str) -> None:
    one, four = (on_ranks(tp, built, name)[0] for tp in (1, 4))
    assert one == four and len(one) > 8


def test_weights_do_not_depend_on_where_they_are_drawn_but_on_the_seed() -> None:
    one, on_device, other = (
        on_ranks(1, built, name, (), seed)[0]
        for name, seed in (("qwen3", 1234), ("qwen3 on the device", 1234), ("qwen3", 1235))
    )
    drawn = {name for name in one if "layernorm" not in name}
    assert one == on_device and all(one[name] != other[name] for name in drawn)


@pytest.mark.parametrize(
    ("patch", "name"),
    (
        ("initial-weights-device", "qwen3 on the device"),
        ("initial-weights-gpt", "gpt-2 shape"),
        ("initial-weights-bert", "bert"),
        *([("initial-weights-t5", "t5")] if HAS_T5 else []),
    ),
)
def test_weights_depend_on_tp_without(patch: str, name: str) -> None:
    one, four = (on_ranks(tp, built, name, (patch,))[0] for tp in (1, 4))
    assert one != four


def test_weights_do_not_depend_on_what_else_the_stage_holds_but_do_without_the_patch() -> None:
    for without, same in (((), True), (("initial-weights-cpu",), False)):
        whole_model, later_stage = (on_ranks(1, built, name, without)[0] for name in ("qwen3", "without an embedding"))
        assert all(whole_model[name] == later_stage[name] for name in later_stage) is same


def test_two_layers_of_one_shape_have_weights_of_their_own() -> None:
    @lambda check: on_ranks(1, check)
    def _() -> None:
        patches.enable()
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        weights = dict(gpt(1, QWEN3, num_layers=2).named_parameters())
        first, second = (weights[f"decoder.layers.{n}.mlp.linear_fc1.weight"] for n in (0, 1))
        assert not torch.equal(first, second)
        assert abs(float(first.std()) - 0.02) < 0.001  # of 9216 draws, whose standard error is 0.00015


def layers_by_themselves(batch: patches.Batch) -> list[str]:
    """Digests of two layers of every stage, the first of which builds another one before."""
    patches.enable(batch=batch)
    parallel_state.initialize_model_parallel(1, torch.distributed.get_world_size())
    torch.manual_seed(1234)

    def layer() -> torch.Tensor:
        settings = {"config": config(1, **QWEN3), "init_method": torch.nn.init.normal_}
        return ColumnParallelLinear(8, 8, bias=False, gather_output=False, **settings).weight

    if torch.distributed.get_rank() == 0:
        layer()
    return [digest({"": layer()}) for _ in range(2)]


def test_layers_outside_of_a_model_have_other_weights_on_every_stage() -> None:
    (alone,) = on_ranks(1, layers_by_themselves, "ordered")
    first, second = on_ranks(2, layers_by_themselves, "ordered")
    assert first == alone and len({*first, *second}) == 4


def test_layers_outside_of_a_model_are_refused_in_a_pipeline_where_no_layout_counts() -> None:
    assert on_ranks(1, layers_by_themselves, "order-free") == on_ranks(1, layers_by_themselves, "ordered")
    with pytest.raises(AssertionError, match="a layer outside of GPTModel, .* with pipeline_model_parallel_size=2 is"):
        on_ranks(2, layers_by_themselves, "order-free")


def first_step_with(change: Any) -> str:
    patches.enable()
    tp = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tp)
    model_parallel_cuda_manual_seed(1)
    model = gpt(tp, QWEN3)
    if torch.distributed.get_rank() == 1:
        change(model)
    try:
        require_agreement([model], parallel_state.get_tensor_model_parallel_group())
    except patches.UnsupportedError as error:
        return str(error)
    return ""


def other_norm(model: Any) -> None:
    model.decoder.final_layernorm.weight.data[3] += 1


def other_seed(model: Any) -> None:
    model.patches_seeds = {"cpu": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    (
        (other_norm, "ranks 1 have another decoder.final_layernorm.weight than rank 0"),
        (other_seed, "ranks 1 have another seed of model 0 than rank 0"),
        (lambda model: torch.set_default_dtype(torch.float64), "ranks 1 have another torch.get_default_dtype()"),
        (lambda model: None, ""),
    ),
)
def test_ranks_that_hold_different_things_are_told_before_the_first_update(change: Any, said: str) -> None:
    answers = on_ranks(2, first_step_with, change)
    assert answers[0] == answers[1] and said in answers[0] and bool(said) == bool(answers[0])


def train_a_model_that_is_older_than_the_patches(tp: int) -> dict[str, Any]:
    patches.cpu.enable()
    wrap = plain_megatron.DistributedDataParallel

    def enable_and_wrap(*args: Any, **kwargs: Any) -> Any:
        patches.enable()
        return wrap(*args, **kwargs)

    plain_megatron.DistributedDataParallel = enable_and_wrap
    return plain_megatron.train(tp=tp, shape="gpt2", model={"use_cpu_initialization": False})


def test_a_model_that_is_older_than_the_patches_is_refused_where_it_is_spread() -> None:
    """Nothing else tells it apart: LayerNorms of a whole hidden size are torch's own at every TP."""
    with pytest.raises(AssertionError, match="word_embeddings was built before patches.enable.* build the model after"):
        on_ranks(2, train_a_model_that_is_older_than_the_patches, 2)


def test_training_compares_ranks() -> None:
    """The comparison is called from Megatron's own finalize_model_grads."""

    def train() -> None:
        patches.enable()
        original = plain_megatron.DistributedDataParallel.broadcast_params

        def broadcast(self: Any) -> None:
            original(self)
            if torch.distributed.get_rank() == 1:
                next(p for n, p in self.named_parameters() if "final_layernorm" in n).data += 1

        plain_megatron.DistributedDataParallel.broadcast_params = broadcast
        plain_megatron.train(tp=2)

    with pytest.raises(AssertionError, match="tensor-parallel ranks 1 have another .*final_layernorm.weight"):
        on_ranks(2, train)
