"""The page of `keras-jax`."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tpcheck.pages.colours import COLOURS, INK
from tpcheck.pages.figures import LOOK, WIDTH, png, tidy
from tpcheck.study.keras_jax.findings import LOOKED_AT, SEEN, all_bits, kinds_of_bits
from tpcheck.study.keras_jax.hlo import summary
from tpcheck.study.keras_jax.mutants import MUTANTS
from tpcheck.study.page import Block, Heading, Page, Paragraph, Picture, Table
from tpcheck.study.study import Results

__all__ = ["page"]

KINDS = ("stock fp32", "stock bf16", "tree fp32", "tree bf16")


def page(settings: Any, results: Results) -> Page:
    """Question, answer, picture; Keras models, rules, products, the contract."""
    return Page(
        answer="No: wherever a sum is really spread over devices, Keras and JAX differ from one device by rounding, "
        "and a loss that agrees to the last digit hides it. Exactness can be built: layers whose sums have one order, "
        "of exact leaves, have the same bits on 1, 2, 4 and 8 devices, forward and backward.",
        picture=Picture(_picture(results), "Left: how far Keras models on 2 and 4 devices are from one. Right: output "
                        "and all gradients of an MLP on 1, 2, 4 and 8 devices; one colour a row is one result."),
        blocks=[*_keras_blocks(settings, results), *_rule_blocks(results["rules"]), *_product_blocks(results["leaves"]),
                *_contract_blocks(settings, results["contract"])],
        summary=[_bits_of_all(results["contract"])],
    )  # fmt: skip


def _picture(results: Results) -> bytes:
    with pyplot.rc_context(LOOK):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(WIDTH * 1.5, 3.4), width_ratios=(1.25, 1), layout="constrained"
        )
        _draw_models(left, results)
        _draw_bits(right, results["contract"])
        return png(figure)


def _draw_models(axes: Axes, results: Results) -> None:
    names = list(results["keras-2"])
    for row, devices in enumerate("24"):
        for column, (what, mark) in enumerate((("forward max", "o"), ("Adam steps", "^"))):
            found = [results[f"keras-{devices}"][name]["sharded"][what] for name in names]
            values = [one["max"] if isinstance(one, dict) else one for one in found]
            label = f"{'outputs' if mark == 'o' else 'weights after training'}, {devices} devices"
            axes.plot([i + (row - 0.5) * 0.3 for i in range(len(names))], values, mark, color=COLOURS[2 * column + row],
                      label=label)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=15)
    axes.set_title("largest difference from one device", color=INK)
    axes.legend(fontsize=7, frameon=False)
    tidy(axes)


def _draw_bits(axes: Axes, contract: dict[str, Any]) -> None:
    for row, kind in enumerate(KINDS):
        seen: list[str] = []
        for column, run in enumerate(contract.values()):
            digest = all_bits(run[kind])
            seen += [] if digest in seen else [digest]
            axes.add_patch(Rectangle((column, row), 0.94, 0.9, color=COLOURS[seen.index(digest)]))
            axes.text(
                column + 0.47, row + 0.45, digest[:4], color="white", ha="center", va="center", family="monospace"
            )
    axes.set(xlim=(0, len(contract)), ylim=(len(KINDS), 0), title="output and all gradients", xlabel="devices")
    axes.set_xticks([column + 0.47 for column in range(len(contract))], list(contract))
    axes.set_yticks([row + 0.45 for row in range(len(KINDS))], KINDS)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _keras_blocks(settings: Any, results: Results) -> list[Block]:
    rows, shapes = [], []
    for devices in "24":
        for name, found in results[f"keras-{devices}"].items():
            for way in settings.ways:
                one = found[way]
                rows.append([
                    name, devices, way, f"{one['forward max']:.1e}", f"{one['forward mean']:.1e}", f"{one['loss']:.1e}",
                    *(f"{one[key]['max']:.1e} ({one[key]['tensors']}/{found['tensors']})"
                      for key in ("1 SGD step", "Adam steps")),
                    summary(one["collectives"]["forward"]), summary(one["collectives"]["both"]),
                ])  # fmt: skip
            shapes += [[name, devices, path, str(full), str(local)]
                       for path, (full, local) in found["sharded"]["local"].items()]  # fmt: skip
    head = ("model", "devices", "way", "output, max", "mean", "loss", "weights, 1 SGD (differing)",
            f"{settings.adam_steps} Adam", "collectives forward", "and backward")  # fmt: skip
    return [
        Heading("Four Keras models, on one device and on several"),
        Paragraph(
            "`keras.distribution.ModelParallel` on simulated CPU devices, float32, random biases, equal weights. "
            "Shapes on a device are held against the layout when a model is built, and collectives are read from what "
            "XLA compiled: what is called sharded is. `again` is one device a second time, `replicated` a mesh without "
            "rules, `column only` without the kernels that a layer sums over: replicated, outputs "
            "and losses are equal, as they would be if models were compared that nobody sharded; weights of attention "
            "are not, even so: XLA compiles another program for a mesh."
        ),
        Table(head, rows, "Differences from one device"),
        Table(
            ("model", "devices", "parameter", "whole", "on a device"), shapes, "Shapes of all parameters", folded=True
        ),
    ]


def _rule_blocks(rules: dict[str, Any]) -> list[Block]:
    rows = []
    for row in rules["mutants"]:
        cells = [f"{row[key]:.0e}{' ✓' if row[key] > SEEN else ''}" for key in (*LOOKED_AT, "later loss")]
        rows.append([row["mutant"] or "none: the right program", MUTANTS.get(row["mutant"], ""), row["biases"], *cells])
    return [
        Heading("The rules, and what a test must look at"),
        Paragraph(
            "An embedding, attention and an MLP under `shard_map` on two devices, with the reductions written out, "
            "against the same on one; float64, so that rounding and mistakes cannot be confused. Each mutant breaks "
            "one rule. A tick marks a test that sees it: a comparison of losses, or of models with zero biases, misses "
            "several; gradients with random biases miss none. Losses some steps later see them, too, but name nothing."
        ),
        Table(("mutant", "rule", "biases", "loss", "output", "gradients", "loss 3 steps later"), rows,
              "Relative differences from one device"),
    ]  # fmt: skip


def _product_blocks(leaves: dict[str, Any]) -> list[Block]:
    rows = [
        [one["product"], one["dtype"], "·".join(map(str, one["shape"])), *(f"{p:.2f}" for p in one["percent"].values())]
        for one in leaves["products"]
    ]
    return [
        Heading("Is a product that nobody cuts exact?"),
        Paragraph(
            "A column-parallel layer's sums stay whole, so its maths is exact. XLA's kernel, its blocks and its "
            "threads follow the shape all the same: the same rows and columns, multiplied in pieces, give other bits. "
            "So our leaves are exact products: operands are cut into slices short enough that float64 adds their "
            "products without rounding, in any order."
        ),
        Table(("product", "dtype", "M·K·N", *leaves["products"][0]["percent"]), rows, "Elements that differ, per cent"),
    ]  # fmt: skip


def _bits_table(contract: dict[str, Any]) -> Table:
    rows = [
        [kind, tensor, *(run[kind]["bits"][tensor][:8] for run in contract.values()),
         "one" if count == 1 else f"{count} different"]
        for kind in KINDS for tensor, count in kinds_of_bits(contract, kind).items()
    ]  # fmt: skip
    return Table(("layers", "tensor", *_device_counts(contract), ""), rows, "Digests of each", folded=True)


def _bits_of_all(contract: dict[str, Any]) -> Table:
    rows = [[kind, *(all_bits(run[kind]) for run in contract.values())] for kind in KINDS]
    return Table(
        ("layers", *_device_counts(contract)), rows, "Digests of the MLP's gathered output and all its gradients"
    )


def _device_counts(contract: dict[str, Any]) -> list[str]:
    return [f"{n} device{'s' if n != '1' else ''}" for n in contract]


def _contract_blocks(settings: Any, contract: dict[str, Any]) -> list[Block]:
    sent = [(kind, devices, run[kind]["collectives"]) for kind in KINDS for devices, run in contract.items()]
    wire = [[kind, devices, summary(all_), ", ".join(shape for _, shape in all_)] for kind, devices, all_ in sent]
    trained = [[kind, *(str(n) for n in kinds_of_bits(contract, kind, "trained").values())] for kind in KINDS]
    return [
        Heading("The same bits by construction"),
        Paragraph(
            f"row(relu(column(x))) at hidden size {settings.hidden}, {settings.ffn} inside, {settings.tokens} tokens, "
            "each device count in a process of its own. `tree` cuts a spread dimension into 8 leaves, adds exact "
            "leaves in float32 by one binary tree, of which a device owns a subtree, and rounds once; local sums are "
            "one exact leaf. `stock` is the same with `@` and `psum`, whose bfloat16 parts XLA adds in float32, for it "
            "may keep excess precision: few elements differ there. A test holds `tree`'s bits against those of "
            "`patches` under PyTorch: they are equal, too."
        ),
        _bits_of_all(contract),
        _bits_table(contract),
        Table(("layers", *kinds_of_bits(contract, KINDS[0], "trained")), trained,
              f"Different weights among the device counts after {settings.steps} steps of gradient descent"),
        Table(("layers", "devices", "collectives", "shapes"), wire, "What XLA sends", folded=True),
    ]  # fmt: skip
