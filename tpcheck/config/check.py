"""Settings that contradict each other, refused before a process is started for them."""

from __future__ import annotations

from collections.abc import Iterator

from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError

__all__ = ["check"]


def check(config: RunConfig) -> None:
    """Refuse what cannot run, before a process is started for it."""
    model, tp, problems = config.model, config.tp, []

    def must_divide(name: str, divisor: int, value_name: str, value: int, remedy: str) -> None:
        if value % divisor:
            problems.append(f"{name}={divisor} does not divide {value_name}={value}: {remedy}")

    if config.strategy == "tree" and config.leaves & (config.leaves - 1):
        problems.append(f"leaves={config.leaves} is not a power of two")
    elif config.strategy == "tree" and config.leaves % tp:
        problems.append(
            f"tp={tp} does not divide leaves={config.leaves}: use a power of two up to {config.leaves}, "
            'or strategy="gather"'
        )
    must_divide("tp", tp, "num_attention_heads", model.num_attention_heads, "use another tp")
    must_divide("tp", tp, "ffn_hidden_size", model.ffn_hidden_size, "use another tp or width")
    must_divide("tp", tp, "the padded vocabulary", model.padded_vocab_size, "use another tp")
    must_divide("num_query_groups", model.num_query_groups, "num_attention_heads", model.num_attention_heads, "")
    if model.num_query_groups % tp and tp % model.num_query_groups:
        problems.append(f"tp={tp} and num_query_groups={model.num_query_groups}: one must be a multiple of the other")
    if model.positions == "rope" and model.head_dim % 2:
        problems.append(f"head_dim={model.head_dim} is odd: rotary positions turn pairs")
    if config.sequence_parallel:
        must_divide("tp", tp, "seq_length", config.seq_length, "sequence_parallel cuts the sequence")
    problems += _of_the_pipeline(config)
    if config.global_batch_size % (config.micro_batch_size * config.dp):
        problems.append(
            f"global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size * dp = "
            f"{config.micro_batch_size} * {config.dp}"
        )
    if config.seq_length > model.max_positions:
        problems.append(f"seq_length={config.seq_length} is above max_positions={model.max_positions}")
    if config.data.kind == "megatron" and config.data.path is None:
        problems.append("data.kind=megatron needs data.path, the prefix of a .bin/.idx pair")
    if config.strategy != "stock" and model.dropout:
        problems.append(f"model.dropout={model.dropout} depends on tp: use 0, or strategy=stock")
    if config.order_free and config.strategy == "stock":
        problems.append("batch=order-free is the patches': use strategy=tree or gather, or batch=null")
    if config.attention == "blockwise" and config.strategy == "stock":
        problems.append("attention=blockwise is the patches' own: use strategy=tree or gather, or attention=null")
    if config.attention in ("flash", "fused"):
        if config.layers == "local":
            problems.append(f"attention={config.attention} is Transformer Engine's: use layers=te")
        if config.dtype != "bf16":
            problems.append(f"attention={config.attention} has no {config.dtype}: use dtype=bf16")
    if problems:
        raise TpcheckError("; ".join(problem.rstrip(": ") for problem in problems))


def _of_the_pipeline(config: RunConfig) -> Iterator[str]:
    """What pipeline stages cannot be made of."""
    model, pp, vpp = config.model, config.pp, config.vpp
    if model.num_layers % (pp * vpp):
        yield f"pp * vpp = {pp} * {vpp} does not divide num_layers={model.num_layers}: every stage has as many layers"
    if pp == 1 and vpp > 1:
        yield f"vpp={vpp} cuts pipeline stages and pp=1 makes none: use vpp=1, or a larger pp"
    if pp > 1 and model.tied and config.strategy != "stock" and not config.order_free:
        yield (
            f"model.tied=true with pp={pp} is not covered, the embedding's gradient is then a sum over stages: "
            "use batch=order-free, model.tied=false, pp=1, or strategy=stock"
        )
    if pp > 1 and config.trace is not None and config.recompute:
        yield f"recompute in a pipeline of pp={pp} is not traced: use recompute=false, pp=1, or trace=null"
    if vpp > 1 and config.microbatches % pp:
        yield (
            f"pp={pp} does not divide the {config.microbatches} microbatches of a step, which vpp={vpp} needs: "
            "use another global_batch_size or micro_batch_size, or vpp=1"
        )
