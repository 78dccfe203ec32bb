"""`patches.cpu.enable()`: stock megatron-core on CPU, whenever it is called; torch as it is where there is a GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from patches import cpu
from tests.support.ranks import on_ranks

LATE = """
import torch, megatron.core.optimizer, megatron.core.fusions.fused_bias_swiglu as fused
from patches import cpu
cpu.enable(), cpu.enable()
assert torch.zeros(2, device="cuda").to("cuda:0").cuda().device.type == "cpu"
assert torch.nn.Linear(2, 2, device="cuda").cuda().to("cuda").weight.device.type == "cpu"
fused.swiglu(torch.ones(2, 4))
assert not torch._dynamo.utils.counters["frames"], "torch.compile ran"
assert torch.nn.Parameter(torch.ones(1)).type() == "torch.FloatTensor"
torch.cuda.manual_seed(3); first = torch.rand(2)
torch.cuda.set_rng_state(torch.cuda.get_rng_state()); torch.manual_seed(3)
assert torch.equal(first, torch.rand(2))
"""


def test_enabling_after_megatron_was_imported_works_as_well() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", LATE], check=True, timeout=120)


def _marked_norms(normalization: str, sequence_parallel: bool) -> dict[str, bool]:
    cpu.enable()
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization=normalization,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        persist_layer_norm=False,
    )
    norm: Any = WrappedTorchNorm(config, 8, eps=1e-6)
    assert norm.eps == 1e-6
    return {name: parameter.sequence_parallel for name, parameter in norm.named_parameters()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("normalization", "names"), [("RMSNorm", {"weight"}), ("LayerNorm", {"weight", "bias"})])
def test_norms_are_marked_for_the_reduction_of_their_gradients(
    normalization: str, names: set[str], sequence_parallel: bool
) -> None:
    (marked,) = on_ranks(1, _marked_norms, normalization, sequence_parallel)
    assert marked == dict.fromkeys(names, sequence_parallel)


ON_A_GPU = """
import torch
torch.cuda.is_available = lambda: True
touched = lambda: (torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream)
before = touched()
from patches import cpu
cpu.enable()
assert before == touched()
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2,
                           sequence_parallel=True, persist_layer_norm=False)
assert WrappedTorchNorm(config, 8).weight.sequence_parallel
"""


def test_torch_is_left_alone_where_there_is_a_gpu_and_megatron_mended() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", ON_A_GPU], check=True, timeout=120)
