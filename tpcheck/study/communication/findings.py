"""What became of the analysis' claims, and of those about what drops communication."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

from tpcheck.study.communication.settings import SIZES
from tpcheck.study.study import Finding, Results
from tpcheck.study.text import percent, small

__all__ = ["case", "findings", "mean_losses", "millions"]

ALLOWED = 0.01  # of the loss: what the paper calls little
MEASURED = 0.02  # in nats: a loss that is as derived
ROUNDING = 1e-6  # relative, of a float32 loss at another TP size; measured are some 1e-9


def findings(results: Results) -> list[Finding]:
    """All of them, in the order of the page."""
    return [*_of_model(results), *_of_collectives(results), *_of_less(results)]


def case(results: Results, tp: int, sp: bool = False) -> dict[str, Any]:
    """The collectives at one TP size."""
    return next(one for one in results["collectives"]["cases"] if (one["tp"], one["sp"]) == (tp, sp))


def _all_reduces(one: dict[str, Any]) -> dict[str, int]:
    """How many of a layer, by phase."""
    return {phase: sum(row["count"] for row in one["layer"] if (row["phase"], row["name"]) == (phase, "all-reduce"))
            for phase in ("forward", "backward")}  # fmt: skip


def mean_losses(results: Results, tied: bool) -> dict[str, float]:
    """Over seeds: the loss where the target is the input (`same`), the next token (`next`), and the former derived."""
    found = results["loss"]
    rows = [row for row in found["losses"] if row["tied"] == tied]
    means = {key: mean(row[key] for row in rows) for key in ("same", "next", "lift")}
    return {**means, "derived": found["ln_v"] + found["spread"] - means["lift"]}


def millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"


def _of_model(results: Results) -> Iterator[Finding]:
    found = results["loss"]
    whole, without = found["parameters"], found["parameters"] - found["positions"]
    yield Finding(
        "The model has 123.69M parameters",
        "holds only if positions are not counted" if millions(without) == "123.69M" else "does not hold",
        f"Megatron's GPT of this shape has {millions(whole)}, {millions(without)} without learned positions; "
        "embedding and output are one matrix",
    )
    tied, next_token = mean_losses(results, True), found["ln_v"] + found["spread"]
    explained = abs(tied["derived"] - tied["same"]) < MEASURED and abs(next_token - tied["next"]) < 2 * MEASURED
    yield Finding(
        "A model that knows nothing starts at a loss of 9.93",
        "holds only if it is asked for its input, with tied embeddings" if explained else "does not hold",
        f"of its input {tied['same']:.2f} ({tied['derived']:.2f} derived), of the next token {tied['next']:.2f} "
        f"({next_token:.2f} derived, ln V + d·σ²/2), untied {mean_losses(results, False)['same']:.2f} of either",
    )


def _of_collectives(results: Results) -> Iterator[Finding]:
    four = case(results, 4)
    every = [_all_reduces(case(results, tp)) for tp in SIZES[1:]]
    same, counts = all(one == every[0] for one in every), every[0]
    yield Finding(
        "A layer needs two all-reduces",
        "holds only if nobody runs backward" if same and counts == {"forward": 2, "backward": 2} else "does not hold",
        f"{counts['forward']} forward and {counts['backward']} backward, at TP=2, 4 and 8",
    )
    cases = results["collectives"]["cases"]
    equal = all(one["sent"] == one["on_paper"] for one in cases)
    yield Finding(
        "`tpcheck cost` says what a step sends",
        "holds" if equal else "does not hold",
        f"{len(cases)} layouts, TP=1 to 8, with and without sequence parallelism: "
        + ("equal to the byte" if equal else "not equal")
        + f"; {four['sent'] / 1e6:.1f} MB a rank at TP=4",
    )
    shapes = results["collectives"]["shapes"]
    columns = shapes["fc1"][0] == shapes["fc2"][1] and shapes["fc1"][1] == shapes["fc2"][0]
    yield Finding(
        "The first matrix of an MLP is cut by rows, the second by columns",
        "does not hold" if columns else "holds",
        f"at TP=2 a rank has fc1 {shapes['fc1']} and fc2 {shapes['fc2']}, stored [out, in]: fc1 is cut along its "
        "outputs, the columns of A in x·A, fc2 along its inputs, the rows of B",
    )
    adds = [row for row in results["sums"]["rows"] if row["how"] == "float32"]
    summed = all(row["relative"] < 2 * results["sums"]["rounding"] for row in adds)
    yield Finding(
        "All-reduce puts the ranks' parts of a result together",
        "does not hold" if summed else "holds",
        "every rank has all features of y, and a part of each one's sum: adding them gives the whole product but for "
        f"{small(adds[-1]['relative'])}, one rounding to bfloat16; putting side by side is what an all-gather does. A "
        "bias is added after it, once",
    )
    norms = [row for one in cases if not one["sp"] for row in one["step"] if row["phase"] == "step"]
    yield Finding(
        "LayerNorm needs communication",
        "holds only if sequence parallelism is on" if not norms else "holds",
        f"{len(norms)} collectives for it without: every rank has all features of all tokens; with it, the gradients "
        "of gamma and beta, and of row layers' biases, are summed in one, "
        f"{case(results, 4, True)['step'][-1]['bytes'] / 1e3:.0f} kB a step",
    )


def _of_less(results: Results) -> Iterator[Finding]:
    plain, sequence = case(results, 4), case(results, 4, True)
    ratio = sequence["sent"] / plain["sent"]
    yield Finding(
        "Sequence parallelism saves communication",
        "does not hold" if ratio >= 1 else "holds",
        f"it sends {ratio:.2f} times as much: an all-reduce becomes a reduce-scatter and an all-gather, of the same "
        "bytes together, and backward gathers inputs again that it did not keep; what it saves is memory",
    )
    losses = results["spd"]["losses"]
    whole, *dropped = losses["4"]
    few = sum(1 for loss in dropped if loss / whole - 1 < ALLOWED)
    every = dropped[-1] / whole - 1
    yield Finding(
        "Leaving attention's sum out of blocks (SPD) costs less than 1 % of the loss",
        "holds" if few == len(dropped) else f"holds only if at most {few} of {len(dropped)} blocks are chosen",
        f"all blocks at TP=4: {every:+.2%}, at TP=8 {losses['8'][-1] / losses['8'][0] - 1:+.2%}; by construction one "
        "all-reduce fewer a block, forward, of two",
    )
    exact = max(abs(one[0] / whole - 1) for one in losses.values())
    apart = max(one[-1] for one in losses.values()) - min(one[-1] for one in losses.values())
    yield Finding(
        "A model with sums left out is the same model at another TP size",
        "does not hold" if exact < ROUNDING < apart / whole else "holds",
        f"with all blocks dropped the losses at TP=1, 2, 4, 8 are {apart:.1e} apart, with none {exact * whole:.0e}: "
        "the first is another function of each, which no order of additions brings together",
    )
    rows = {(row["how"], row["tp"]): row for row in results["sums"]["rows"]}
    bf16, fp32, tree = (rows[how, 8] for how in ("bfloat16", "float32", "tree"))
    better = fp32["relative"] < bf16["relative"]
    yield Finding(
        "Sums over ranks in bfloat16 are as good as in float32, for half the bytes",
        "does not hold" if better else "holds",
        f"at TP=8 an error of {small(bf16['relative'])} against {small(fp32['relative'])}, which is one rounding's; "
        f"bits are TP=1's in all but {percent(bf16['differing'] / bf16['size'])} and "
        f"{percent(fp32['differing'] / fp32['size'])} of elements, under `tree` in all, for "
        f"{tree['sent_per_element'] / bf16['sent_per_element']:.1f} times bfloat16's bytes",
    )
