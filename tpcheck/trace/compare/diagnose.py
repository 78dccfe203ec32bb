"""What kind of mistake a suspect tensor looks like: B held against A in the ways that silent bugs have been seen.

adds up      what the ranks hold sums to A: a reduction is missing
scaled       B = s·A: s near TP, 1/TP, DP … says which sum was doubled, left out or averaged
by shard     only some ranks' boxes are wrong, or each is scaled by a factor of its own
permuted     the same values in other places: shards in the wrong order
stale        A of the step before, or the sum of both
rounded      B's numbers all fit in bfloat16 while A's do not
"""

from __future__ import annotations

import math

import numpy as np

from tpcheck.checkpoint.tiling import Array
from tpcheck.trace.compare.logical import Key, Logical
from tpcheck.trace.compare.metrics import Numbers
from tpcheck.trace.compare.reader import Trace

__all__ = ["adds_up", "explain", "others", "resumed_otherwise"]

NEAR = 0.1  # how alike two tensors are that are called the same but for the mistake, relative in norm
MOST_BLOCKS, MOST_SHOWN, MOST_SHIFT = 64, 8, 4


def explain(key: Key, a: Logical, b: Logical, trace_a: Trace, trace_b: Trace, found: Numbers, near: float) -> str:
    """The likeliest mistake in a few words, and what it is inferred from; `near` is as far as rounding may go."""
    if found.nan:
        return f"{found.nan} elements are not numbers on one side"
    if math.isinf(found.max_abs):
        return "infinite on one side, or on both with opposite signs"
    x, y = a.values(), b.values()
    sizes = _sizes(key, a, trace_a, trace_b)
    return (
        _zero(x, y)
        or _stale(key, x, y, trace_a)
        or _scaled(x, y, sizes)
        or _permuted(x, y, max(trace_b.tp, trace_b.dp), near)
        or _rounded(a, b)
        or _by_shard(x, y, b)
        or _along(x, y)
        or (_partial_norm(found, sizes) if b.replicas else "")
        or _constant(x, y)
        or f"norm ratio {_ratio(found):.3g}, cosine {found.cosine:.3g}"
    )


def others(key: Key, a: Logical, b: Logical, trace: Trace) -> str:
    """What is said of integers that are not A's: tokens, labels, positions."""
    x, y = a.bits.astype(np.int64), b.bits.astype(np.int64)
    for step in sorted({one.step for one in trace.records if one.step != key.step}):
        there = trace.logical_or_none(key._replace(step=step))
        if there is not None and np.array_equal(there.bits, b.bits):
            return f"other integers: they are A's of step {step}; look at what says which samples a step reads"
    for by in range(1, min(MOST_SHIFT, x.shape[-1] - 1) + 1):
        for sign, left, right in ((by, x[..., by:], y[..., :-by]), (-by, x[..., :-by], y[..., by:])):
            if np.array_equal(left, right):
                return f"other integers: shifted by {abs(sign)} {'to the left' if sign > 0 else 'to the right'}"
    steps = np.unique(y - x)
    if len(steps) == 1:
        return f"other integers: each is {steps[0]} more than A's"
    same = (x == y).reshape(len(x), -1).all(1)
    if same.any() and len(x) > 1:
        wrong = [str(sample) for sample in np.flatnonzero(~same)]
        return f"other integers, in samples {', '.join(wrong[:MOST_SHOWN])} of {len(x)}"
    return "other integers"


def resumed_otherwise(key: Key, a: Logical, b: Logical) -> str:
    """What a run that goes on at the same layout begins with, and should have as it was left."""
    x, y = a.values(), b.values()
    what = "the weight" if key.kind.endswith("weight") else f"the optimizer's {key.kind.partition('.')[2]}"
    if not y.any() and x.any():
        return f"{what} begins at zero: it was not restored"
    if b.dtype == "float32" and (b.bits & 0xFFFF == 0).all() and not (a.bits & 0xFFFF == 0).all():
        return f"{what} has come back rounded to bfloat16: it was saved so, or rebuilt from the rounded weights"
    return f"{what} is not what the uninterrupted run had after the step before: it was not saved, or not restored"


def _sizes(key: Key, a: Logical, trace_a: Trace, trace_b: Trace) -> dict[str, float]:
    """The sizes that a factor may be, by the name of what has them."""
    sizes = {"TP": trace_b.tp, "DP": trace_b.dp, "microbatches": trace_b.microbatches(key.step)}
    sizes |= {"ranks": trace_b.world, "microbatches × DP": trace_b.dp * trace_b.microbatches(key.step)}
    return {name: float(size) for name, size in sizes.items() if size > 1}


def adds_up(a: Logical, b: Logical) -> str:
    """Whether unequal replicas are parts of a sum that has not been taken."""
    if b.replicas is None or _apart(a.values(), b.replicas.add_up) > NEAR:
        return ""
    return f"a reduction is missing: what the {1 + len(b.replicas.others)} ranks hold adds up to A"


def _zero(x: Array, y: Array) -> str:
    return "all zero" if not y.any() and x.any() else ""


def _stale(key: Key, x: Array, y: Array, trace: Trace) -> str:
    before = trace.logical_or_none(key._replace(step=key.step - 1))
    if before is None or before.bits.shape != x.shape:
        return ""
    old, off = before.values(), _apart(x, y)
    if _apart(old, y) < min(NEAR, off / 4):
        return "stale: it is A's of the step before"
    share = _factor(old, y - x)  # below 1 where clipping has scaled what was left
    if key.kind == "grad" and share > 0 and _apart(x + share * old, y) < min(NEAR, off / 4):
        return f"stale: {share:.3g} of the last step's has been added, as if it had not been zeroed"
    return ""


def _scaled(x: Array, y: Array, sizes: dict[str, float]) -> str:
    factor = _factor(x, y)
    left = _apart(factor * x, y)
    # A factor near 1 explains nothing where as much is off without it.
    if not factor or abs(factor - 1) < 1e-3 or left > NEAR or left > _apart(x, y) / 2:
        return ""
    return f"scaled by {factor:.4g}{_named(factor, sizes)}"


def _by_shard(x: Array, y: Array, b: Logical) -> str:
    """Ranks whose shards are right while others' are not; or scaled, each by itself."""
    shards = _shards(b)
    if len(shards) < 2:
        return ""
    pairs = {ranks: _joined(x, y, boxes) for ranks, boxes in shards.items()}
    errors = {ranks: _apart(one, other) for ranks, (one, other) in pairs.items()}
    wrong = [ranks for ranks, error in errors.items() if not error <= max(errors.values()) / 4]
    if 0 < len(wrong) < len(shards):
        joined_x, joined_y = (np.concatenate([pairs[ranks][side] for ranks in wrong]) for side in (0, 1))
        detail = _zero(joined_x, joined_y) or _scaled(joined_x, joined_y, {})
        names = ", ".join(str(rank) for ranks in wrong for rank in ranks)
        return f"only what ranks {names} hold is wrong" + (f": {detail}" if detail else "")
    factors = [_factor(one, other) for one, other in pairs.values()]
    if max(abs(factor - 1) for factor in factors) < 0.01:
        return ""
    if all(_apart(f * one, other) <= NEAR for f, (one, other) in zip(factors, pairs.values(), strict=True)):
        return f"each rank's shard is scaled by a factor of its own: {', '.join(f'{f:.3g}' for f in factors[:8])}"
    return ""


def _shards(tensor: Logical) -> dict[tuple[int, ...], list[tuple[slice, ...]]]:
    """Boxes by the ranks that hold them."""
    holders: dict[str, list[int]] = {}
    boxes = {}
    for rank, box in tensor.ranks:
        holders.setdefault(repr(box), []).append(rank)
        boxes[repr(box)] = box
    shards: dict[tuple[int, ...], list[tuple[slice, ...]]] = {}
    for text, ranks in holders.items():
        shards.setdefault(tuple(sorted(set(ranks))), []).append(boxes[text])
    return shards


def _joined(x: Array, y: Array, boxes: list[tuple[slice, ...]]) -> tuple[Array, Array]:
    one, other = (np.concatenate([tensor[box].reshape(-1) for box in boxes]) for tensor in (x, y))
    return one, other


def _permuted(x: Array, y: Array, blocks: int, near: float) -> str:
    """Equal blocks of some dimension that B has in another order than A."""
    for dim in range(x.ndim):
        for count in dict.fromkeys((blocks, 2 * blocks, 3 * blocks, x.shape[dim])):
            if not 1 < count <= MOST_BLOCKS or x.shape[dim] % count:
                continue
            in_a, in_b = (np.split(tensor, count, dim) for tensor in (x, y))
            order = [int(np.argmin([_apart(block, piece) for block in in_a])) for piece in in_b]
            matched = all(_apart(in_a[i], piece) <= near for i, piece in zip(order, in_b, strict=True))
            if matched and len(set(order)) == count and order != list(range(count)):
                shown = ", ".join(map(str, order[:MOST_SHOWN])) + (" …" if count > MOST_SHOWN else "")
                return f"put together in another order: of {count} blocks along dimension {dim}, A's {shown}"
    return ""


def _rounded(a: Logical, b: Logical) -> str:
    if a.dtype != "float32" or b.dtype != "float32":
        return ""
    coarse_a, coarse_b = (float((t.bits & 0xFFFF == 0).mean()) for t in (a, b))
    return "rounded to bfloat16 on the way" if coarse_b > 0.99 and coarse_a < 0.5 else ""


def _along(x: Array, y: Array) -> str:
    """Where along one dimension all of the error is."""
    for dim in range(x.ndim):
        rest = tuple(other for other in range(x.ndim) if other != dim)
        error, square = ((z * z).sum(rest) for z in (y - x, x))
        if len(error) < 4 or not error.any():
            continue
        held = np.flatnonzero(error > error.max() / 100)
        if len(held) <= np.count_nonzero(square) / 4:
            span = f"{held[0]}" if len(held) == 1 else f"{held[0]} to {held[-1]}"
            off = math.sqrt(error[held].sum() / max(square[held].sum(), 1e-300))
            return f"only {len(held)} of {len(error)} indices along dimension {dim} are off, {span}, by {off:.2g}"
    return ""


def _constant(x: Array, y: Array) -> str:
    """The same number added everywhere."""
    difference = y - x
    mean = float(difference.mean())
    if x.size > 1 and mean and float(np.abs(difference - mean).max()) < NEAR * abs(mean):
        return f"{mean:.4g} is added to every element"
    return ""


def _partial_norm(found: Numbers, sizes: dict[str, float]) -> str:
    """Partial sums of independent numbers: norms go with the square root of how many there are."""
    for name, size in sizes.items():
        for exponent, word in ((-0.5, "missing"), (0.5, "doubled, or sums over too many ranks")):
            if abs(math.log(max(_ratio(found), 1e-300) / size**exponent)) < 0.15:
                sign = "1/" if exponent < 0 else ""
                return f"norm ratio {_ratio(found):.3g} ≈ {sign}√{name}: a reduction is {word}"
    return ""


def _named(factor: float, sizes: dict[str, float]) -> str:
    for name, size in sizes.items():
        if abs(factor / size - 1) < 0.05:
            return f" = {name}: summed once too often over its ranks" if name in ("TP", "DP", "ranks") else f" = {name}"
        if abs(factor * size - 1) < 0.05:
            return f" = 1/{name}"
    return ""


def _ratio(found: Numbers) -> float:
    return found.norm_b / found.norm_a if found.norm_a else math.inf


def _factor(x: Array, y: Array) -> float:
    square = float((x * x).sum())
    return float((x * y).sum()) / square if square else 0.0


def _apart(x: Array, y: Array) -> float:
    norm = float(np.linalg.norm(y))
    return float(np.linalg.norm(x - y)) / norm if norm else math.inf
