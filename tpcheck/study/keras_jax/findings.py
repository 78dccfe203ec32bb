"""What became of the analysis' claims, from the numbers alone."""

from __future__ import annotations

import hashlib
from typing import Any

from tpcheck.study.keras_jax.hlo import summary
from tpcheck.study.keras_jax.mutants import MUTANTS
from tpcheck.study.study import Finding, Results

__all__ = ["SEEN", "all_bits", "findings", "kinds_of_bits", "which_tests_see"]

SEEN = 1e-9  # in float64, where rounding is at most 1e-11 and a mistake at least 1e-4
LOOKED_AT = ("loss", "forward", "gradients")


def findings(results: Results) -> list[Finding]:
    """In the order of the page's tables."""
    return [*_of_keras(results), *_of_rules(results["rules"]), *_of_bits(results)]


def _spread(results: Results, way: str = "sharded") -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Model and devices, the model's numbers, those of a way to spread it."""
    keras = [(devices, name, found) for devices in "24" for name, found in results[f"keras-{devices}"].items()]
    return [(f"{name} on {devices}", found, found[way]) for devices, name, found in keras if way in found]


def _of_keras(results: Results) -> list[Finding]:
    runs = _spread(results)
    where, whole, worst = max(runs, key=lambda run: run[2]["forward max"])
    exact = [name for name, _, one in runs if one["forward max"] == 0]
    same_loss = [name for name, _, one in runs if one["loss"] == 0]
    trained = [(one["1 SGD step"]["tensors"], one["Adam steps"]["tensors"], found["tensors"]) for _, found, one in runs]
    sgd, adam, tensors = map(sum, zip(*trained, strict=True))
    gathers = [f"{name}: {summary(one['collectives']['forward'])}" for name, _, one in _spread(results, "column only")]
    any_gather = ["all-gather" in text for text in gathers]
    return [
        Finding(
            "a sharded model's output is the unsharded one's, exactly, in four models",
            "holds" if len(exact) == len(runs) else "does not hold",
            f"exact in {len(exact)} of {len(runs)} runs; largest difference {worst['forward max']:.1e} of outputs up "
            f"to {whole['largest output']:.2f} ({where} devices), float32 rounding: a sum over devices has another "
            "order",
        ),
        Finding(
            "the losses differ by 0.00e+00",
            "holds" if len(same_loss) == len(runs) else "holds only if the one number rounds to the same",
            f"equal in {len(same_loss)} of {len(runs)} runs, in all of which outputs differ: equal losses show little",
        ),
        Finding(
            "weights are the same after training",
            "does not hold" if sgd + adam else "holds",
            f"of {tensors} tensors {sgd} differ after one step of SGD, {adam} after the steps of Adam",
        ),
        Finding(
            "a column-parallel layer is followed by an all-gather where the next layer is not row-parallel",
            "holds" if all(any_gather) else "holds only if the compiler finds no cheaper way",
            "with the kernels of column layers sharded alone, XLA's forward has "
            + "; ".join(text.replace(" on 2", "") for text in gathers[:4])
            + ": it cuts the next kernel itself and reduces",
        ),
    ]  # fmt: skip


def which_tests_see(rules: dict[str, Any], mutant: str, biases: str) -> list[str]:
    """What of a loss, the output and gradients, with such biases, tells the mutant from the right program."""
    row = next(row for row in rules["mutants"] if row["mutant"] == mutant and row["biases"] == biases)
    return [name for name in LOOKED_AT if row[name] > SEEN]


def _of_rules(rules: dict[str, Any]) -> list[Finding]:
    right = max(row[name] for row in rules["mutants"] if not row["mutant"] for name in LOOKED_AT)
    found = []
    for mutant, rule in MUTANTS.items():
        seen = which_tests_see(rules, mutant, "random")
        missed = [
            f"{', '.join(blind)} with {biases} biases" for biases in ("zero", "random")
            if (blind := [name for name in LOOKED_AT if name not in which_tests_see(rules, mutant, biases)])
        ]  # fmt: skip
        row = next(row for row in rules["mutants"] if row["mutant"] == mutant and row["biases"] == "random")
        worst = max(row[name] for name in LOOKED_AT)
        text = f"“{mutant}” is {worst:.1e} off where the right program is {right:.0e}; "
        text += f"not seen by {'; nor by '.join(missed)}" if missed else "every test sees it"
        found.append(Finding(rule, "holds" if seen and right < SEEN else "does not hold", text))
    blind = [mutant for mutant in MUTANTS if "loss" not in which_tests_see(rules, mutant, "zero")]
    found.append(Finding(
        "equal losses of freshly initialised models show that a layer is right",
        "does not hold" if blind else "holds",
        f"{len(blind)} of {len(MUTANTS)} mutants have the right loss where biases are zero, as Keras draws them",
    ))  # fmt: skip
    return found


def kinds_of_bits(contract: dict[str, Any], name: str, what: str = "bits") -> dict[str, int]:
    """Of each tensor, how many different ones the device counts give."""
    first = next(iter(contract.values()))
    return {tensor: len({run[name][what][tensor] for run in contract.values()}) for tensor in first[name][what]}


def all_bits(run: dict[str, Any]) -> str:
    """One digest of the output and all gradients."""
    return hashlib.sha256("".join(run["bits"].values()).encode()).hexdigest()[:8]


def _of_bits(results: Results) -> list[Finding]:
    contract, products = results["contract"], results["leaves"]["products"]
    plain = [row for row in products if row["product"] != "exact"]
    worst = {
        dtype: max(max(row["percent"].values()) for row in plain if row["dtype"] == dtype) for dtype in ("fp32", "bf16")
    }
    exact = max(max(row["percent"].values()) for row in products if row["product"] == "exact")
    integers = results["rules"]["integers"]
    found = [
        Finding(
            "a column-parallel product is exact, for its sums are not cut",
            "holds only if the kernel does not follow the shape" if max(worst.values()) else "holds",
            f"of XLA's dot on a CPU, cut along M or N as devices would, up to {worst['fp32']:.0f} % of the elements "
            f"differ in float32 and {worst['bf16']:.2f} % in bfloat16; of exact products {exact:.0f} %",
        ),
        Finding(
            "a difference of 0.0 can be had honestly",
            "holds only if nothing is rounded, or every sum has one order",
            f"small integers without softmax in float64: forward {integers['forward']:.1f}, gradients "
            f"{integers['gradients']:.1f}",
        ),
    ]  # fmt: skip
    for kind in ("stock", "tree"):
        several = {
            f"{dtype} {what}": [t for t, n in kinds_of_bits(contract, f"{kind} {dtype}", what).items() if n > 1]
            for dtype in ("fp32", "bf16") for what in ("bits", "trained")
        }  # fmt: skip
        texts = [
            f"{name.replace('bits', 'output and gradients')}: {', '.join(t) or 'none'}" for name, t in several.items()
        ]
        devices = ", ".join(contract)
        found.append(Finding(
            f"{kind} layers have the same bits on {devices} devices",
            "does not hold" if any(several.values()) else "holds",
            f"differing: {'; '.join(texts)}" if any(several.values()) else
            "output, gradients of the input and all parameters, trained weights, in float32 and bfloat16",
        ))  # fmt: skip
    return found
