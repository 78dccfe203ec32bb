"""Bugs that make a forward pass wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_softmax
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import cross_entropy, layers, mappings
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from tests.silent_bugs.case import GPT2, QWEN3, SP2, TP2, around, bug, during, tp_rank, tp_size
from tests.support.traces import replaced

REDUCE = "reduce_from_tensor_model_parallel_region"


@bug("out *.self_attention.linear_proj", layout=TP2)
def attention_output_not_reduced() -> Iterator[None]:
    """The attention's output projection keeps each rank's partial sum."""
    with during(SelfAttention, "forward", layers, REDUCE, lambda x, group=None: x):
        yield


@bug("out *.mlp.linear_fc2", layout=TP2)
def mlp_output_reduced_twice() -> Iterator[None]:
    """The MLP's second layer sums over the ranks what has been summed already."""
    once = layers.reduce_from_tensor_model_parallel_region
    with during(MLP, "forward", layers, REDUCE, lambda x, group=None: once(once(x, group=group), group=group)):
        yield


@bug(
    "out *.linear_proj", "out *.self_attention", layout=TP2, model=GPT2,
    source="https://github.com/huggingface/text-generation-inference/issues/1036",
)  # fmt: skip
def row_parallel_bias_added_on_every_rank() -> Iterator[None]:
    """A row-parallel layer adds its bias before the all-reduce, so that it comes TP times."""

    def wrap(forward: Any) -> Any:
        def biased(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
            y, bias = forward(self, x)
            return (y if bias is None else y + (tp_size() - 1) * bias.detach()), bias

        return biased

    with around(layers.RowParallelLinear, "forward", wrap):
        yield


@bug("out embedding.word_embeddings", layout=TP2)
def embedding_rows_of_foreign_tokens_not_masked() -> Iterator[None]:
    """For tokens of other ranks the vocabulary-parallel embedding adds its row 0 instead of zeros."""

    def forward(self: Any, tokens: Tensor) -> Tensor:
        own = (tokens >= self.vocab_start_index) & (tokens < self.vocab_end_index)
        rows = F.embedding(torch.where(own, tokens - self.vocab_start_index, 0), self.weight)
        return layers.reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)

    with replaced(layers.VocabParallelEmbedding, "forward", forward):
        yield


@bug("out embedding.word_embeddings", layout=TP2)
def vocabulary_offset_by_one_shard() -> Iterator[None]:
    """Each rank takes the next rank's range of the vocabulary for its own."""

    def wrap(range_of: Any) -> Any:
        return lambda size, rank, world: range_of(size, (rank + 1) % world, world)

    with around(layers.VocabUtility, "vocab_range_from_global_vocab_size", wrap):
        yield


@bug("out model", layout=TP2)
def cross_entropy_with_each_ranks_own_maximum() -> Iterator[None]:
    """The cross-entropy subtracts each shard's maximum, not the vocabulary's: the all-reduce of it is missing."""
    reduce = torch.distributed.all_reduce

    def without_maximum(x: Tensor, op: Any = torch.distributed.ReduceOp.SUM, **kwargs: Any) -> Any:
        return None if op == torch.distributed.ReduceOp.MAX else reduce(x, op=op, **kwargs)

    with during(cross_entropy._VocabParallelCrossEntropy, "forward", torch.distributed, "all_reduce", without_maximum):
        yield


@bug("out model", layout=TP2, source="https://github.com/bigscience-workshop/Megatron-DeepSpeed/issues/394")
def cross_entropy_normalised_by_own_shard() -> Iterator[None]:
    """The cross-entropy's sum of exponentials runs over the rank's own shard of the vocabulary only."""
    reduce = torch.distributed.all_reduce
    calls = []

    def without_last(x: Tensor, **kwargs: Any) -> Any:
        calls.append(x)  # of three: the maximum, the targets' logits, the sum of exponentials
        return None if len(calls) % 3 == 0 else reduce(x, **kwargs)

    with during(cross_entropy._VocabParallelCrossEntropy, "forward", torch.distributed, "all_reduce", without_last):
        yield


@bug("out model", layout=TP2)
def targets_of_other_shards_not_masked() -> Iterator[None]:
    """A rank that does not hold the target adds the logit of its own row 0 to the target's."""

    def wrap(calculate: Any) -> Any:
        def unmasked(*args: Any) -> Any:
            mask, target, _, total, weights = calculate(*args)
            rows = weights.view(-1, weights.shape[-1])
            picked = torch.log(rows[torch.arange(len(rows)), target])
            return mask, target, picked.view(mask.shape), total, weights

        return unmasked

    with around(VocabParallelCrossEntropy, "calculate_predicted_logits", wrap):
        yield


@bug("in *.mlp.linear_fc2", layout=TP2, source="https://github.com/NVIDIA/Megatron-LM/issues/360")
def gate_and_up_swapped_on_one_rank() -> Iterator[None]:
    """Rank 1 takes the gated layer's up half for its gate."""
    chunk = torch.chunk

    def swapped(x: Tensor, chunks: int, dim: int = 0) -> Any:
        halves = chunk(x, chunks, dim)
        return halves[::-1] if tp_rank() == 1 else halves

    with during(MLP, "forward", torch, "chunk", swapped):
        yield


@bug(
    "out *.q_layernorm", layout=TP2, model={**QWEN3, "num_query_groups": 4},
    source="https://github.com/alibaba/ChatLearn/pull/277",
)  # fmt: skip
def grouped_queries_taken_for_contiguous() -> Iterator[None]:
    """[q q k v │ q q k v] of grouped-query attention is read as [q q q q │ k k │ v v]."""

    def read(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        heads, groups, width = (
            self.num_attention_heads_per_partition,
            self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
        )
        mixed = self.linear_qkv(hidden)[0].unflatten(-1, (-1, width))
        query, key, value = mixed.split([heads, groups, groups], 2)
        return self.q_layernorm(query), self.k_layernorm(key), value

    with replaced(SelfAttention, "get_query_key_value_tensors", read):
        yield


@bug("out rotary_pos_emb", layout=SP2, source="https://github.com/NVIDIA-NeMo/Speech/pull/6178")
def rope_restarts_at_every_sequence_shard() -> Iterator[None]:
    """Rotary positions are counted from the beginning of each sequence-parallel shard."""

    def wrap(get_emb: Any) -> Any:
        def restarting(self: Any, length: int, offset: int = 0) -> Tensor:
            return get_emb(self, length // tp_size(), offset).repeat(tp_size(), 1, 1, 1)

        return restarting

    with around(RotaryEmbedding, "get_emb", wrap):
        yield


@bug("out embedding.position_embeddings", "out embedding*", layout=TP2, model=GPT2)
def positions_added_on_every_rank() -> Iterator[None]:
    """Learned positions join the embeddings before the all-reduce, so that they come TP times."""

    def wrap(forward: Any) -> Any:
        def repeated(self: Any, positions: Tensor) -> Tensor:
            y = forward(self, positions)
            return y + (tp_size() - 1) * y.detach()

        return repeated

    with around(torch.nn.Embedding, "forward", wrap):
        yield


@bug("out *.scale_mask_softmax", "out *.core_attention", layout=TP2)
def causal_mask_one_too_far_on_one_rank() -> Iterator[None]:
    """Rank 1's heads see the token that they are to predict."""

    def wrap(mask: Any) -> Any:
        return lambda size: torch.ones(size, size, dtype=torch.bool).triu(2) if tp_rank() == 1 else mask(size)

    with around(fused_softmax, "get_default_causal_mask", wrap):
        yield


@bug("settings softmax_scale *.core_attention", layout=TP2)
def attention_scaled_by_a_ranks_width() -> Iterator[None]:
    """The attention's scale 1/√d is taken from a width that TP has divided."""

    def wrap(init: Any) -> Any:
        def scaled(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.softmax_scale *= tp_size() ** 0.5

        return scaled

    with around(DotProductAttention, "__init__", wrap):
        yield


@bug("out *.linear_qkv", layout=SP2)
def sequence_shards_gathered_in_reverse() -> Iterator[None]:
    """Before a column-parallel layer the sequence shards are put together last rank first."""
    gather = layers.dist_all_gather_func

    def reverse(out: Tensor, x: Tensor, **kwargs: Any) -> None:
        gather(out, x, **kwargs)
        out.copy_(torch.cat(out.chunk(tp_size())[::-1]))

    cls = layers.LinearWithGradAccumulationAndAsyncCommunication
    with during(cls, "forward", layers, "dist_all_gather_func", reverse):
        yield


@bug(
    "out embedding*", layout=SP2, model=GPT2, source="https://github.com/NVIDIA/Megatron-LM/issues/7452",
)  # fmt: skip
def every_rank_takes_the_first_sequence_shard() -> Iterator[None]:
    """The embeddings are scattered over the sequence by a rank that is 0 everywhere."""

    def first(x: Tensor, group: Any) -> Tensor:
        return x.chunk(group.size())[0].contiguous()

    with during(mappings._ScatterToSequenceParallelRegion, "forward", mappings, "_split_along_first_dim", first):
        yield


@bug("settings eps *layernorm", layout=TP2)
def norm_epsilon_of_another_model() -> Iterator[None]:
    """Norms add 1e-5 where the model has 1e-6."""

    def wrap(new: Any) -> Any:
        return lambda cls, config, hidden_size, eps=1e-5, **kwargs: new(cls, config, hidden_size, eps=1e-5, **kwargs)

    with around(WrappedTorchNorm, "__new__", wrap):
        yield
