"""Memory of one rank, as far as it follows from the configuration: what Megatron allocates, whatever the strategy.

    certain     weights, gradients, Adam's state, logits: allocated whatever else happens
    likely      and activations, communication buffers, the libraries

Bytes per parameter, bf16: weight 2, float32 gradient 4, float32 main weight 4, Adam's two moments 8: 18. The
distributed optimizer shares the last 12 out over dp * cp. fp32: weight 4, gradient 4, moments 8 (shared out likewise).
Where sums over the batch have no order, gradients are 8 bytes each while they are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpcheck.config.schema import ModelConfig, RunConfig

__all__ = ["GIB", "Memory", "bytes_per_parameter", "memory", "parameters", "parameters_of_experts"]

GIB = 2**30
GPU_LIBRARIES_GIB = 2.5  # CUDA's context, cuBLAS's and NCCL's buffers
CPU_LIBRARIES_GIB = 0.4


@dataclass(frozen=True)
class Memory:
    """GiB of one rank."""

    model: float  # weights, gradients, optimizer
    logits: float
    activations: float
    libraries: float

    @property
    def certain(self) -> float:
        return self.model + self.logits

    @property
    def likely(self) -> float:
        return self.certain + self.activations + self.libraries


def memory(config: RunConfig, on_gpu: bool) -> Memory:
    """What the fullest rank takes: one of the first pipeline stage, or of the last."""
    stages = (_of_stage(config, stage, on_gpu) for stage in {0, config.pp - 1})
    return max(stages, key=lambda size: size.likely)


def _of_stage(config: RunConfig, stage: int, on_gpu: bool) -> Memory:
    tokens = config.micro_batch_size * config.seq_length / config.cp
    logits = tokens * config.model.padded_vocab_size / config.tp * 12  # bf16, their float32 copy, its gradient
    return Memory(
        (parameters(config, stage) * bytes_per_parameter(config) + _bytes_of_experts(config)) / GIB,
        (logits if stage == config.pp - 1 else 0) / GIB,
        _activations(config, stage, on_gpu) / GIB,
        GPU_LIBRARIES_GIB if on_gpu else CPU_LIBRARIES_GIB,
    )


def parameters(config: RunConfig, stage: int = 0) -> float:
    """Dense parameters of one rank of a pipeline stage; norms and some biases are not sharded, and small."""
    model, first, last = config.model, stage == 0, stage == config.pp - 1
    heads = model.head_dim * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    mlp = _dense_width(model) * _matrices(model)
    matrices = 1 if model.tied and first and last else first + last
    embeddings = model.padded_vocab_size * model.hidden_size * matrices
    learned = model.max_positions * model.hidden_size if model.positions == "learned" and first else 0
    routers = model.num_layers / config.pp * model.hidden_size * (model.experts.number if model.experts else 0)
    return (
        (model.num_layers / config.pp * model.hidden_size * (heads + mlp) + embeddings) / config.tp + routers + learned
    )


def _matrices(model: ModelConfig) -> int:
    """Of a feed-forward layer, a gated one's gate and up apart; it keeps as many of its widths for backward."""
    return 3 if model.activation == "swiglu" else 2


def _dense_width(model: ModelConfig) -> int:
    """The feed-forward width that every token goes through: all of a dense model, a shared expert's."""
    return model.ffn_hidden_size if model.experts is None else model.experts.shared_ffn_hidden_size or 0


def _bytes_of_experts(config: RunConfig) -> float:
    """Weights, gradients and optimizer of a rank's experts, which it shares with fewer ranks than dense layers."""
    replicas = config.tp * config.dp / (config.ep * config.expert_tp)
    return parameters_of_experts(config) * bytes_per_parameter(config, replicas)


def parameters_of_experts(config: RunConfig) -> float:
    """Parameters of one rank's experts."""
    model, experts = config.model, config.model.experts
    if experts is None:
        return 0.0
    width = experts.number * experts.ffn_hidden_size * _matrices(model)
    return model.num_layers / config.pp * model.hidden_size * width / (config.ep * config.expert_tp)


def bytes_per_parameter(config: RunConfig, replicas: float | None = None) -> float:
    """Bytes of a parameter that `replicas` ranks hold; dp if not given."""
    weight, shared = (2, 12) if config.dtype == "bf16" else (4, 8)
    gradient = 8 if config.order_free else 4
    return weight + gradient + shared / ((replicas or config.dp * config.cp) if config.distributed_optimizer else 1)


def _activations(config: RunConfig, stage: int, on_gpu: bool) -> float:
    """Bytes kept for the backward pass; with recompute, every layer's input and the insides of one layer."""
    model, tokens = config.model, config.micro_batch_size * config.seq_length / config.cp
    size = 2 if config.dtype == "bf16" else 4
    whole = size * tokens * model.hidden_size / (config.tp if config.sequence_parallel else 1)
    heads = model.head_dim * (model.num_attention_heads + 2 * model.num_query_groups)
    mlp = _dense_width(model) * _matrices(model)
    if model.experts is not None:  # a token's rows, as they come to experts and inside of them
        mlp += model.experts.per_token * (model.hidden_size + model.experts.ffn_hidden_size * _matrices(model))
    # Queries, keys and values twice (normalised, rotated), attention's output, the MLP's two widths.
    sharded = size * tokens * (2 * heads + model.num_attention_heads * model.head_dim + mlp) / config.tp
    # Unfused attention keeps the scores' softmax in float32, and rounded where that is another dtype.
    unfused = config.attention_on(on_gpu) == "unfused"
    scores = unfused * (6 if size == 2 else 4) * tokens * config.seq_length * model.num_attention_heads / config.tp
    inside = 4 * whole + sharded + scores
    layers = model.num_layers / config.pp * _in_flight(config, stage)
    return layers * whole + inside if config.recompute else layers * inside


def _in_flight(config: RunConfig, stage: int) -> float:
    """Microbatches that a stage keeps activations of at once: as many as it starts before its first backward pass."""
    later = config.pp - 1 - stage
    pieces = later + 1 if config.vpp == 1 else 2 * later + (config.vpp - 1) * config.pp + 1
    return min(pieces / config.vpp, config.microbatches)
