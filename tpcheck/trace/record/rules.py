"""How a module's tensors and a parameter are cut over ranks: Megatron's classes by a table, DTensors by placement.

A rule has a letter per dimension:

    S  the sequence, cut over tensor parallelism if the model is sequence parallel      F  the same, never cut
    B  the batch, cut over data parallelism and microbatches                            .  whole on every rank
    H  cut over tensor parallelism: heads, features, vocabulary                         G  gated: [gate_r │ up_r]
    K  key/value heads: cut, or held by several ranks where there are fewer than ranks
    t  in front: the tensor's first two dimensions are to be swapped, as they are at other TP sizes

A tensor with no rule is taken for whole, which the comparison of replicas then confirms or refutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tpcheck.trace.record.deepspeed import autotp_activation, autotp_parameter
from tpcheck.trace.record.rank_layout import RankLayout, megatron_config
from tpcheck.trace.record.shards import Shards, whole

__all__ = ["Batch", "Rules", "is_of_an_expert"]

HIDDEN, COLUMN = "SB.", "FBH"
# By class name, so that subclasses and Transformer Engine's are met too: (output, input).
BY_CLASS = {
    "ColumnParallelLinear": (COLUMN, HIDDEN),
    "TEColumnParallelLinear": (COLUMN, HIDDEN),
    "TELayerNormColumnParallelLinear": (COLUMN, HIDDEN),
    "RowParallelLinear": (HIDDEN, COLUMN),
    "TERowParallelLinear": (HIDDEN, COLUMN),
    "LanguageModelEmbedding": (HIDDEN, None),
    "DotProductAttention": (COLUMN, None),
    "TEDotProductAttention": (COLUMN, None),
    "FusedScaleMaskSoftmax": ("BHFF", None),
    "Attention": (HIDDEN, None),
    "MLP": (HIDDEN, None),
    "MoELayer": (HIDDEN, None),
    "Router": (HIDDEN, HIDDEN),
    "TransformerLayer": (HIDDEN, None),
    "TransformerBlock": (HIDDEN, None),
    "MultiTokenPredictionLayer": (HIDDEN, None),
}
BY_NAME = {
    "q_layernorm": ("FBH.", "FBH."),
    "k_layernorm": ("FBK.", "FBK."),
    "enorm": (HIDDEN, HIDDEN),
    "hnorm": (HIDDEN, HIDDEN),
    "attention_dropout": ("BHFF", None),
    "position_embeddings": ("BF.", None),
    "rotary_pos_emb": ("....", None),
}


@dataclass(frozen=True)
class Batch:
    """Of a microbatch: its number in the step, and the sides of the model's input on this rank."""

    number: int
    samples: int
    length: int


def is_of_an_expert(name: str) -> bool:
    """Whether a module or parameter works on an expert's rows, which are no tokens of this rank."""
    return ".experts" in name


class Rules:
    """What `tensor`, met in `module`, is a part of. The rank's `layout` and the models decide."""

    def __init__(self, models: Sequence[torch.nn.Module], layout: RankLayout) -> None:
        self.layout, self.config = layout, megatron_config(models)
        self.ranges = _flat_ranges(models, layout)

    def output(self, name: str, module: torch.nn.Module, tensor: torch.Tensor, batch: Batch) -> Shards:
        return self._activation(self._rule(name, module, tensor, 0), 0, module, tensor, batch)

    def input(self, name: str, module: torch.nn.Module, tensor: torch.Tensor, batch: Batch) -> Shards:
        return self._activation(self._rule(name, module, tensor, 1), 1, module, tensor, batch)

    def is_cut_input(self, name: str, module: torch.nn.Module, tensor: torch.Tensor) -> bool:
        """Whether the module's input is cut in features, as a row-parallel layer's is."""
        return self._rule(name, module, tensor, 1) == COLUMN

    def hidden(self, tensor: torch.Tensor, batch: Batch) -> Shards:
        """What dropout is applied to in Megatron: hidden states, or attention's probabilities."""
        rule = {3: HIDDEN, 4: "BHFF"}.get(tensor.dim()) if self.config is not None else None
        return self._activation(rule, 0, torch.nn.Module(), tensor, batch)

    def parameter(self, name: str, parameter: torch.nn.Parameter, values: torch.Tensor) -> Shards:
        """`values` are the parameter's, or like it in shape and cut."""
        if hasattr(values, "device_mesh"):
            return _placed(values)
        shards, layout = whole(values), self.layout
        if hasattr(parameter, "ds_is_replaced_module"):
            return autotp_parameter(parameter, shards, layout.tp_rank)
        if not getattr(parameter, "tensor_model_parallel", False):
            return shards
        dim: int = parameter.partition_dim  # type: ignore[attr-defined]
        rank, size = (layout.etp_rank, layout.etp) if is_of_an_expert(name) else (layout.tp_rank, layout.tp)
        if dim == 0 and "linear_fc1." in name and self.config is not None and self.config.gated_linear_unit:
            return shards.gated(dim, rank, size)
        return shards.cut(dim, rank, size, "row" if dim else "column")

    def updated(self, name: str, parameter: torch.nn.Parameter, values: torch.Tensor) -> Shards:
        """`values` are what this rank's optimizer has for the parameter: like it, or the flat range it updates."""
        if parameter not in self.ranges:
            return self.parameter(name, parameter, values)
        start, stop = self.ranges[parameter]
        flat = values.detach().reshape(-1)
        shards = self.parameter(name, parameter, parameter.detach())
        return shards.flattened(flat if flat.numel() == stop - start else flat[start:stop], start)

    def _rule(self, name: str, module: torch.nn.Module, tensor: torch.Tensor, which: int) -> str | None:
        if self.config is None or is_of_an_expert(name):
            return None
        leaf = name.rpartition(".")[2]
        classes = {base.__name__ for base in type(module).__mro__}
        if leaf in BY_NAME:
            return BY_NAME[leaf][which]
        if "VocabParallelEmbedding" in classes:
            return HIDDEN if getattr(module, "reduce_scatter_embeddings", False) else "tFB."
        if "GPTModel" in classes:
            return "BF" if tensor.dim() == 2 else "BFH"
        if leaf.endswith(("layernorm", "embedding_dropout")):
            return HIDDEN
        rule = next((BY_CLASS[key][which] for key in BY_CLASS if key in classes), None)
        if rule == COLUMN and which == 0 and getattr(module, "gather_output", False):
            return "FB."
        if rule == COLUMN and leaf == "linear_fc1" and self.config.gated_linear_unit:
            return "FBG"
        return rule

    def _activation(
        self, rule: str | None, which: int, module: torch.nn.Module, tensor: torch.Tensor, batch: Batch
    ) -> Shards:
        if hasattr(tensor, "device_mesh"):
            placed = _placed(tensor)
            return _batched(placed, tensor.to_local(), batch, self.layout)  # type: ignore[attr-defined]
        if rule and rule[0] == "t":
            rule, tensor = rule[1:], tensor.transpose(0, 1)
        if rule == HIDDEN and tensor.dim() == 2 and batch.samples:  # a router's: tokens are flat
            tensor = tensor.unflatten(0, (-1, batch.samples))
        shards, layout = whole(tensor), self.layout
        if rule is None or len(rule) != tensor.dim():
            if not tensor.dim():  # a loss; each microbatch has its own
                return whole(tensor.reshape(1)).batch(0, batch.number * layout.dp + layout.dp_rank)
            if hasattr(module, "tp_world_size"):
                shards = autotp_activation(module, shards, which, layout.tp_rank)
            else:
                shards = replace(_column_of_dtensor(shards, module, layout), assumed=layout.tp > 1)
            return _batched(shards, tensor, batch, layout)
        for dim, letter in enumerate(rule):
            if letter == "B":
                shards = shards.batch(dim, batch.number * layout.dp + layout.dp_rank)
            elif letter == "S" and layout.sequence_parallel:
                shards = shards.cut(dim, layout.tp_rank, layout.tp, "sequence")
            elif letter == "H":
                shards = shards.cut(dim, layout.tp_rank, layout.tp, "column")
            elif letter == "G":
                shards = shards.gated(dim, layout.tp_rank, layout.tp)
            elif letter == "K":
                groups = min(self.config.num_query_groups or self.config.num_attention_heads, layout.tp)
                shards = shards.cut(dim, layout.tp_rank * groups // layout.tp, groups, "key/value heads")
                # The heads of every rank that holds a copy add to its gradient.
                shards = replace(shards, partial=groups < layout.tp)
        return shards


def _placed(tensor: Any) -> Shards:
    """A DTensor's boxes, as its placements say."""
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    words = tuple(str(placement) for placement in tensor.placements if not placement.is_replicate())
    parts = ((tuple(offset), local.reshape(shape)),) if local.numel() else ()
    partial = any(isinstance(placement, Partial) for placement in tensor.placements)
    return Shards(tuple(tensor.shape), parts, words, partial)


def _column_of_dtensor(shards: Shards, module: torch.nn.Module, layout: RankLayout) -> Shards:
    """A linear layer whose DTensor weight is cut by rows (out-features) gives a plain tensor cut in features."""
    weight: Any = getattr(module, "weight", None)
    if layout.tp == 1 or not hasattr(weight, "placements") or weight.dim() != 2 or not len(shards.shape):
        return shards
    if shards.shape[-1] != weight.shape[0] and shards.shape[-1] == weight.shape[0] // layout.tp:
        return shards.cut(-1, layout.tp_rank, layout.tp, "column")
    return shards


def _batched(shards: Shards, local: torch.Tensor, batch: Batch, layout: RankLayout) -> Shards:
    """With the batch where the sides of the model's input say it is; first if both orders fit."""
    sides = tuple(local.shape[:2])
    index = batch.number * layout.dp + layout.dp_rank
    if sides[:1] == (batch.samples,) and (len(sides) == 1 or sides[1] == batch.length or sides[0] != batch.length):
        return shards.batch(0, index)
    if len(sides) == 2 and sides[1] == batch.samples and sides[0] in (batch.length, batch.length // layout.tp):
        return shards.batch(1, index)
    return replace(shards, alone=True)


def _flat_ranges(models: Sequence[torch.nn.Module], layout: RankLayout) -> dict[torch.nn.Parameter, tuple[int, int]]:
    """Under Megatron's distributed optimizer, which flat range of each parameter this rank reduces and updates."""
    ranges = {}
    model: Any  # Megatron's DDP keeps its buckets where Module has a method
    for model in models:
        if not getattr(getattr(model, "ddp_config", None), "use_distributed_optimizer", False):
            continue
        buffers = [(buffer, layout.dp_rank, layout.dp) for buffer in model.buffers]
        for buffer in getattr(model, "expert_parallel_buffers", ()):
            group = buffer.data_parallel_group
            buffers.append((buffer, group.rank(), group.size()))
        for buffer, rank, ranks in buffers:
            for parameter, (start, stop, number) in buffer.param_index_map.items():
                bucket = buffer.buckets[number]
                size = bucket.grad_data.numel() // ranks
                first = bucket.offset + rank * size
                low, high = max(start, first), min(stop, first + size)
                ranges[parameter] = (low - start, max(low, high) - start)
    return ranges
