"""Memory and time of a cell, estimated from its configuration, against what the profile's machines have.

    certain     weights, gradients, Adam's state, logits: what Megatron allocates whatever else happens.
                More than a GPU has: refused, with what would fit.
    likely      and activations, communication buffers, the libraries. More than a GPU has: a warning.

Bytes per parameter, bf16: weight 2, float32 gradient 4, float32 main weight 4, Adam's two moments 8: 18. The
distributed optimizer shares the last 12 out over dp. fp32: weight 4, gradient 4, moments 8 (shared out likewise).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slurm.profile import Arch, Profile
from slurm.shape import Shape, shape_of
from tpcheck import config as run
from tpcheck.cells import Cell
from tpcheck.config import RunConfig
from tpcheck.errors import TpcheckError

__all__ = ["Memory", "check", "flops", "memory"]

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


def check(cells: Sequence[Cell], profile: Profile) -> list[str]:
    """Refuse cells that cannot run; the rest's warnings, one line each, for as many cells as they concern."""
    warnings: dict[str, list[str]] = {}
    for cell in cells:
        shape = shape_of(cell, profile)
        arch = profile.architectures[shape.arch]
        _refuse_container_paths(cell, profile)
        _refuse_too_much(cell, arch, shape)
        for warning in _warnings(cell.config, profile, arch, shape):
            warnings.setdefault(warning, []).append(cell.name)
    return [f"{', '.join(names)}: {warning}" for warning, names in warnings.items()]


def memory(config: RunConfig, on_gpu: bool) -> Memory:
    """What one rank takes, as far as it follows from the configuration."""
    tokens = config.micro_batch_size * config.seq_length
    logits = tokens * config.model.padded_vocab_size / config.tp * 12  # bf16, their float32 copy, its gradient
    return Memory(
        _parameters(config) * _bytes_per_parameter(config) / GIB,
        logits / GIB,
        _activations(config) / GIB,
        GPU_LIBRARIES_GIB if on_gpu else CPU_LIBRARIES_GIB,
    )


def flops(config: RunConfig) -> float:
    """Floating-point operations of the whole run: 6 per parameter and token, attention, and the second forward pass."""
    model, tokens = config.model, config.steps * config.global_batch_size * config.seq_length
    embedding = 0 if model.tied else model.padded_vocab_size * model.hidden_size  # looked up, not multiplied
    products = 6 * (_parameters(config, tp=1) - embedding)
    attention = 6 * model.num_layers * model.num_attention_heads * model.head_dim * config.seq_length  # causal
    return tokens * (products + attention) * (4 / 3 if config.recompute else 1)


def _parameters(config: RunConfig, tp: int | None = None) -> float:
    """Parameters of one rank; norms and some biases are not sharded, and small."""
    model = config.model
    heads = model.head_dim * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    mlp = model.ffn_hidden_size * (3 if model.activation == "swiglu" else 2)
    embeddings = model.padded_vocab_size * model.hidden_size * (1 if model.tied else 2)
    learned = model.max_positions * model.hidden_size if model.positions == "learned" else 0
    return (model.num_layers * model.hidden_size * (heads + mlp) + embeddings) / (tp or config.tp) + learned


def _bytes_per_parameter(config: RunConfig) -> float:
    kept, shared = (6, 12) if config.dtype == "bf16" else (8, 8)
    return kept + shared / (config.dp if config.distributed_optimizer else 1)


def _activations(config: RunConfig) -> float:
    """Bytes kept for the backward pass; with recompute, every layer's input and the insides of one layer."""
    model, tokens = config.model, config.micro_batch_size * config.seq_length
    size = 2 if config.dtype == "bf16" else 4
    whole = size * tokens * model.hidden_size / (config.tp if config.sequence_parallel else 1)
    heads = model.head_dim * (model.num_attention_heads + 2 * model.num_query_groups)
    mlp = model.ffn_hidden_size * (3 if model.activation == "swiglu" else 2)
    # Queries, keys and values twice (normalised, rotated), attention's output, the MLP's two widths.
    sharded = size * tokens * (2 * heads + model.num_attention_heads * model.head_dim + mlp) / config.tp
    # Unfused attention, which the patches need, keeps the scores' softmax and what it was made from.
    scores = 2 * size * tokens * config.seq_length * model.num_attention_heads / config.tp
    inside = 4 * whole + sharded + scores
    return model.num_layers * whole + inside if config.recompute else model.num_layers * inside


def _refuse_too_much(cell: Cell, arch: Arch, shape: Shape) -> None:
    needed, room = memory(cell.config, arch.gpus_per_node > 0), _room(arch, shape)
    if needed.certain <= room:
        return
    what = f"one {shape.arch} GPU has" if arch.gpus_per_node else f"{shape.arch} nodes have for each rank"
    fits = " or ".join(f"{name} ({size:.0f} GiB)" for name, size in _what_fits(cell.config, arch, room))
    raise TpcheckError(
        f"cell {cell.name} needs at least {needed.certain:.0f} GiB a rank ({needed.model:.0f} for weights, gradients "
        f"and Adam at {_bytes_per_parameter(cell.config):.3g} bytes per parameter, {needed.logits:.1f} for logits), "
        f"{what} {room:.0f}: {f'{fits} would fit' if fits else 'nothing would fit here'}; or exclude the cell"
    )


def _room(arch: Arch, shape: Shape) -> float:
    """GiB for one rank: a GPU's, or a share of the node's."""
    return arch.memory_gib if arch.gpus_per_node else arch.memory_gib / shape.ranks_per_node


def _what_fits(config: RunConfig, arch: Arch, room: float) -> Iterator[tuple[str, float]]:
    """The smallest change of each kind that the machines would take, with its GiB a rank."""
    larger = [{"tp": config.tp * 2**n} for n in range(1, 7)]
    sharing = [{"dp": dp, "distributed_optimizer": True} for dp in (2, 4, 8, 16, 32, 64) if dp >= config.dp]
    for kind in (larger, sharing):
        for changes in [*kind, *({**changes, "recompute": True} for changes in kind)]:
            changed = config.model_copy(update=changes)
            size = memory(changed, arch.gpus_per_node > 0).likely
            if size <= room and changed.world_size <= arch.nodes * arch.per_node and _is_valid(changed):
                yield " ".join(f"{key}={str(value).lower()}" for key, value in changes.items()), size
                break


def _is_valid(config: RunConfig) -> bool:
    try:
        run.check(config)
    except TpcheckError:
        return False
    return True


def _warnings(config: RunConfig, profile: Profile, arch: Arch, shape: Shape) -> Iterator[str]:
    if shape.ranks_per_node % config.tp:
        yield (
            f"tp={config.tp} spans nodes ({shape.ranks_per_node} ranks on each), so every layer's sums go over the "
            "network: slow; a smaller tp stays inside a node"
        )
    needed, room = memory(config, arch.gpus_per_node > 0), _room(arch, shape)
    if needed.likely > room:
        yield (
            f"may run out of memory: about {needed.likely:.0f} GiB a rank with activations, {shape.arch} has "
            f"{room:.0f}; recompute=true or a smaller micro_batch_size takes less"
        )
    if arch.tflops:
        minutes = flops(config) / (arch.tflops * 1e12 * config.world_size) / 60
        starts = 1 + int(minutes // profile.time)
        if starts > 1 + profile.max_retries:
            yield (
                f"takes about {minutes / 60:.1f} hours, {starts} times the limit of {profile.time} minutes, and may "
                f"start {1 + profile.max_retries} times: raise time or max_retries"
            )


def _refuse_container_paths(cell: Cell, profile: Profile) -> None:
    path = cell.config.data.path
    if profile.container and path and not path.startswith("/"):
        raise TpcheckError(f"cell {cell.name}: data.path={path} is relative, which means nothing inside a container")
