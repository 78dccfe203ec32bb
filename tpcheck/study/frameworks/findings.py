"""What became of the analysis' claims, from the numbers alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tpcheck.study.frameworks.trainings import losses_apart, trainings
from tpcheck.study.study import Finding, Results

__all__ = ["differing", "distance", "findings"]

OUT, DOUT, GRAD = "outputs", "gradients of outputs", "gradients of parameters"
BF16, FP32, RANDOM, ZERO = "one-step-bf16", "one-step-fp32", "random biases", "zero biases"
FSDP, AUTOTP = "FSDP2 + DTensor", "AutoTP"
UNSYNCED = "DTensor without gradient sync"


def findings(results: Results) -> list[Finding]:
    """One step first, then trainings."""
    return [*_of_one_step(results), *_of_data_ranks(results["two-data-ranks"]), *_of_trainings(results)]


def distance(step: dict[str, Any], a: str, b: str) -> dict[str, dict[str, Any]]:
    """The numbers of a pair of runs."""
    found: dict[str, dict[str, Any]] = next(
        pair["distances"] for pair in step["pairs"] if (pair["a"], pair["b"]) == (a, b)
    )
    return found


def differing(step: dict[str, Any], a: str, b: str) -> tuple[int, int]:
    """How many tensors of all kinds differ, of how many."""
    kinds = distance(step, a, b).values()
    return sum(len(kind["differing"]) for kind in kinds), sum(kind["tensors"] for kind in kinds)


def _of_one_step(results: Results) -> list[Finding]:
    pair = (AUTOTP, FSDP)
    cases = {"bfloat16, zero biases": results[BF16][ZERO], "bfloat16, random biases": results[BF16][RANDOM],
             "float32, random biases": results[FP32][RANDOM]}  # fmt: skip
    counts = {name: differing(step, *pair) for name, step in cases.items()}
    text = "; ".join(f"{name}: {n} of {all_} tensors differ" for name, (n, all_) in counts.items())
    random = results[BF16][RANDOM]
    to_ddp, to_right = distance(random, "DDP", FSDP), distance(random, "float32", "DDP")
    own, across, other = (
        to_right[GRAD]["error"],
        to_ddp[GRAD]["error"],
        distance(random, "float32", FSDP)[GRAD]["error"],
    )
    fp32 = distance(results[FP32][RANDOM], "DDP", FSDP)[GRAD]["error"]
    losses = {name: random["runs"][name]["losses"][0] for name in ("DDP", FSDP, "float32")}
    off = {name: abs(losses[name] / losses["float32"] - 1) for name in ("DDP", FSDP)}
    hidden = to_ddp[GRAD]["norm"], across
    stock = differing(random, "Megatron stock, TP=1", "Megatron stock, TP=2")
    tree = [differing(results[part][biases], "Megatron tree, TP=1", "Megatron tree, TP=2")
            for part in (BF16, FP32) for biases in (ZERO, RANDOM)]  # fmt: skip
    return [
        Finding(
            "AutoTP and FSDP2 + DTensor compute the same bits",
            _only_if(counts["bfloat16, random biases"][0] == 0, counts["bfloat16, zero biases"][0] == 0,
                     "q, k and v biases are zero, as freshly initialised"),
            f"{text}: AutoTP rounds a product and adds the bias to it, DTensor adds it before rounding",
        ),
        Finding(
            "a loss that agrees to 5e-6 shows that tensor parallelism is right",
            "does not hold",
            f"in bfloat16 the loss of FSDP2 + DTensor is {abs(losses[FSDP] / losses['DDP'] - 1):.1e} from DDP's, and "
            f"DDP's is {off['DDP']:.1e} from that of the same weights in float32: what is compared is rounding. In "
            f"float32 the worst gradient is {fp32:.1e} off, which is a test",
        ),
        Finding(
            "tensor parallelism adds no error to bfloat16's own",
            "holds" if across < 2 * max(own, other) else "does not hold",
            f"worst gradient, relative to float32's: DDP {own:.1e}, FSDP2 + DTensor {other:.1e}; to each other "
            f"{across:.1e}",
        ),
        Finding(
            "gradients agree, for their norms do",
            "does not hold" if hidden[1] > 2 * hidden[0] else "holds",
            f"worst difference of two norms {hidden[0]:.1e}, worst norm of a difference {hidden[1]:.1e}",
        ),
        Finding(
            "stock Megatron computes the same at TP=1 and TP=2",
            "does not hold" if stock[0] else "holds",
            f"{stock[0]} of {stock[1]} tensors differ in bfloat16, worst gradient by "
            f"{distance(random, 'Megatron stock, TP=1', 'Megatron stock, TP=2')[GRAD]['error']:.1e}",
        ),
        Finding(
            "Megatron under `patches` computes the same bits at TP=1 and TP=2",
            "does not hold" if any(n for n, _ in tree) else "holds",
            f"{sum(n for n, _ in tree)} of {sum(all_ for _, all_ in tree)} tensors differ: outputs, their gradients, "
            "parameters' gradients; bfloat16 and float32, zero and random biases",
        ),
    ]  # fmt: skip


def _only_if(always: bool, sometimes: bool, condition: str) -> str:
    return "holds" if always else f"holds only if {condition}" if sometimes else "does not hold"


def _of_data_ranks(step: dict[str, Any]) -> list[Finding]:
    synced, unsynced = (step["runs"][name]["losses"] for name in (FSDP, UNSYNCED))
    found = distance(step, FSDP, UNSYNCED)[GRAD]
    return [Finding(
        "equal losses on every data-parallel rank show that DP=2 is handled right",
        "does not hold" if synced == unsynced else "holds",
        f"without fully_shard, so that nobody adds up gradients, the losses are the very same ({_list(unsynced)}), and "
        f"gradients are up to {found['error']:.0%} wrong ({found['worst']}); {len(found['unequal replicas'])} of "
        f"{found['tensors']} differ between the two data-parallel ranks, which is what `tpcheck compare` names",
    )]  # fmt: skip


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.6f}" for value in values)


def _of_trainings(results: Results) -> list[Finding]:
    runs = trainings(results)
    low = {name: run for name, run in runs.items() if name.endswith("bf16")}
    high = {name: run for name, run in runs.items() if name.endswith("float32 master")}
    last = {name: run["losses"][-1] for name, run in runs.items()}
    steps = len(runs["DDP, bf16"]["losses"])
    apart = [max(losses_apart(a, b)) for group in (low, high) for a, b in pairwise(group.values())]
    recipes = max(losses_apart(runs["DDP, bf16"], runs["DDP, float32 master"]))
    right, wrong = runs[f"{FSDP}, bf16"], runs[f"{FSDP}, bf16, wrong clip"]
    tree = max(losses_apart(runs["Megatron tree, TP=1"], runs["Megatron tree, TP=2"]))
    stock = losses_apart(runs["Megatron stock, TP=1"], runs["Megatron stock, TP=2"])
    return [
        Finding(
            f"the frameworks' loss curves coincide over {steps} steps",
            "holds only if all have the same precision recipe" if recipes > 3 * max(apart) else
            "holds" if max(apart) < 0.05 else "does not hold",
            f"within a recipe at most {max(apart):.1e} apart; DDP's two recipes {recipes:.1e}",
        ),
        Finding(
            "weights in bfloat16 on all sides are the fix where one framework converges faster",
            "does not hold" if last["DDP, float32 master"] < last["DDP, bf16"] else "holds",
            f"loss after {steps} steps: bfloat16 weights {last['DDP, bf16']:.3f} (DDP), {last['AutoTP, bf16']:.3f} "
            f"(AutoTP); float32 master {last['DDP, float32 master']:.3f}, {last['AutoTP, float32 master']:.3f}. Of "
            f"bfloat16 weights {low['DDP, bf16']['moved']:.0%} move in the first step, of float32 ones "
            f"{high['DDP, float32 master']['moved']:.0%}: smaller updates are rounded away",
        ),
        Finding(
            "autocast on one side alone is the same recipe",
            "does not hold" if recipes > 3 * max(apart) else "holds",
            f"autocast keeps float32 weights: its curve is the master's, {recipes:.1e} from that of bfloat16 weights; "
            f"{max(losses_apart(high['DDP, float32 master'], high['FSDP2 + DTensor, float32 master'])):.1e} from "
            "FSDP2's mixed precision",
        ),
        Finding(
            "a wrongly scoped clip shows in the curve",
            "does not hold" if max(losses_apart(right, wrong)) < 3 * max(apart) else
            "holds only if a few times what rounding does is taken for a mistake",
            f"squares added up over all ranks count replicated tensors twice: norm {wrong['norms'][0]:.3f} where it is "
            f"{right['norms'][0]:.3f} ({wrong['norms'][0] / right['norms'][0] - 1:+.0%}); curves "
            f"{max(losses_apart(right, wrong)):.1e} apart, for Adam divides a common factor out",
        ),
        Finding(
            "Megatron under `patches` has one loss curve at TP=1 and TP=2",
            "holds" if tree == 0 else "does not hold",
            f"largest difference {tree:.1f} in {len(runs['Megatron tree, TP=1']['losses'])} steps; "
            f"stock's {max(stock):.1e} in {steps}",
        ),
    ]  # fmt: skip
