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

    # `patches.contract` says the same of the patches' settings, but imports torch, which a login shell is spared.
    if config.strategy != "stock" and config.leaves & (config.leaves - 1):
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
        share = config.seq_length // config.cp
        what = "seq_length" if config.cp == 1 else "seq_length / cp"
        must_divide("tp", tp, what, share, "sequence_parallel cuts the sequence")
    problems += _of_the_pipeline(config)
    problems += _of_chunks(config)
    problems += _of_experts(config)
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


def _of_chunks(config: RunConfig) -> Iterator[str]:
    """What sequences cannot be cut into, or spread over."""
    cp, chunks = config.cp, config.chunks
    if (cp > 1 or chunks > 1) and not config.order_free:
        what, ones = (f"cp={cp}", "cp=1") if cp > 1 else (f"chunks={chunks}", "chunks=1")
        yield f"{what} is for sums without an order: use batch=order-free with chunks={max(chunks, 2 * cp)}, or {ones}"
        return
    if chunks & (chunks - 1):
        yield f"chunks={chunks} is not a power of two"
    elif cp > 1 and chunks % (2 * cp):
        yield (
            f"cp={cp} needs chunks to be a multiple of {2 * cp}, it is {chunks}: set it so at every cp that is to have "
            "the same bits, and let cp be a power of two"
        )
    if config.seq_length % chunks:
        yield f"chunks={chunks} does not divide seq_length={config.seq_length}: use another length or number"
    if chunks > 1 and config.attention not in (None, "blockwise"):
        yield f"chunks={chunks} takes attention=blockwise, not {config.attention}: use attention=null"
    if cp > 1 and config.trace is not None:
        yield f"trace records whole sequences, not what cp={cp} ranks have of them: use cp=1, or trace=null"


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


def _of_experts(config: RunConfig) -> Iterator[str]:
    """What a mixture of experts cannot be made of."""
    experts, ep, etp = config.model.experts, config.ep, config.expert_tp
    if experts is None:
        if ep > 1 or config.etp is not None:
            yield f"ep={ep}, etp={config.etp} spread experts, and the model has none: leave them out"
        return
    if experts.per_token > experts.number:
        yield f"experts.per_token={experts.per_token} of experts.number={experts.number}: use at most as many"
    if experts.number % ep:
        yield f"ep={ep} does not divide experts.number={experts.number}: every rank has as many"
    if (config.tp * config.dp) % (ep * etp):
        yield f"ep * etp = {ep} * {etp} does not divide tp * dp = {config.tp} * {config.dp}, experts' ranks"
    for name, width in (("", experts.ffn_hidden_size), ("shared_", experts.shared_ffn_hidden_size)):
        size = config.tp if name else etp
        if width is not None and width % size:
            yield f"experts.{name}ffn_hidden_size={width} is not divided by {'tp' if name else 'etp'}={size}"
    if config.model.bias:
        yield "experts have no biases: use model.bias=false"
    if config.tp > 1 and not config.sequence_parallel:
        yield f"experts with tp={config.tp} need sequence_parallel=true"
    if experts.bias_update_rate and experts.score != "sigmoid":
        yield f"experts.bias_update_rate={experts.bias_update_rate} is for experts.score=sigmoid"
    if config.layers == "te" and config.strategy == "stock":
        yield "stock draws other weights for experts of Transformer Engine's layers at every layout: use layers=local"
    if config.strategy != "stock":
        if not config.order_free:
            yield "every ep brings an expert other sequences: use batch=order-free, or strategy=stock"
        if config.strategy != "tree":
            yield f"strategy={config.strategy} is not covered with experts: use strategy=tree"
        elif config.leaves % etp:
            yield f"etp={etp} does not divide leaves={config.leaves}: use a power of two up to {config.leaves}"
