"""Are the initial weights the same at every TP size? Stock Megatron's own way to draw them, both ways that it has."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from tpcheck.run.model import seed_everything, transformer_config
from tpcheck.study.megatron import begin
from tpcheck.study.ranks import on_ranks
from tpcheck.study.study import Progress
from tpcheck.study.tp_vs_dp.settings import SIZES, TpVsDp

__all__ = ["weights"]

LAYERS = 2  # each layer is drawn as the first ones are


def weights(settings: TpVsDp, progress: Progress) -> dict[str, Any]:
    """By way of drawing: how many parameters there are, and which differ from TP=1's once gathered."""
    ways = {"use_cpu_initialization=True": True, "use_cpu_initialization=False": False}
    found: dict[str, Any] = {}
    for place, (way, on_cpu) in enumerate(ways.items()):
        whole = {}
        for number, tp in enumerate(SIZES):
            progress((place + number / len(SIZES)) / len(ways), f"{way}, TP={tp}")
            whole[tp] = _gathered(on_ranks(tp, _parts, settings, on_cpu))
        found[way] = {str(tp): sorted(name for name in whole[1] if not torch.equal(whole[1][name], whole[tp][name]))
                      for tp in SIZES[1:]}  # fmt: skip
    return {"parameters": sorted(whole[1]), "elements": sum(w.numel() for w in whole[1].values()), "differing": found}


def _parts(settings: TpVsDp, on_cpu: bool) -> dict[str, tuple[Tensor, int, int]]:
    """This rank's part of every parameter, with the dimension that is cut, -1 if none is, and into how many pieces."""
    tp = begin("stock")
    config = settings.run(tp=tp, dtype="bf16")
    config.model.num_layers = LAYERS
    described = transformer_config(config)
    described.use_cpu_initialization = on_cpu
    seed_everything(config.seed)
    model = GPTModel(
        described, get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=config.model.padded_vocab_size, max_sequence_length=config.seq_length,
        position_embedding_type="rope", share_embeddings_and_output_weights=True,
    )  # fmt: skip
    return {name: (p.detach(), _cut(p), getattr(p, "partition_stride", 1)) for name, p in model.named_parameters()}


def _cut(parameter: Any) -> int:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1


def _gathered(ranks: list[dict[str, tuple[Tensor, int, int]]]) -> dict[str, Tensor]:
    whole = {}
    for name, (first, dim, stride) in ranks[0].items():
        parts = [rank[name][0] for rank in ranks]
        if dim < 0:
            assert all(torch.equal(first, part) for part in parts), f"{name} is not replicated"
            whole[name] = first
        else:
            pieces = [part.chunk(stride, dim) for part in parts]
            whole[name] = torch.cat([piece[i] for i in range(stride) for piece in pieces], dim)
    return whole
