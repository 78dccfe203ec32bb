"""The page of `frameworks`."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

from tpcheck.pages.colours import COLOURS
from tpcheck.pages.figures import LOOK, WIDTH, png, tidy
from tpcheck.study.frameworks.trainings import losses_apart, trainings
from tpcheck.study.page import Block, Heading, Page, Paragraph, Picture, Table
from tpcheck.study.study import Results

__all__ = ["page"]

CURVES = {
    "DDP, bf16": (0, "-"), "AutoTP, bf16": (1, "--"), "FSDP2 + DTensor, bf16": (2, ":"),
    "DDP, float32 master": (3, "-"), "AutoTP, float32 master": (4, "--"), "FSDP2 + DTensor, float32 master": (5, ":"),
    "Megatron tree, TP=2": (6, "-."),
}  # fmt: skip
APART = {
    "AutoTP, bf16": "DDP, bf16", "FSDP2 + DTensor, bf16": "DDP, bf16",
    "FSDP2 + DTensor, bf16, wrong clip": "FSDP2 + DTensor, bf16",
    "AutoTP, float32 master": "DDP, float32 master", "FSDP2 + DTensor, float32 master": "DDP, float32 master",
    "DDP, float32 master": "DDP, bf16", "Megatron stock, TP=1": "DDP, float32 master",
    "Megatron stock, TP=2": "Megatron stock, TP=1", "Megatron tree, TP=1": "Megatron stock, TP=1",
    "Megatron tree, TP=2": "Megatron tree, TP=1",
}  # fmt: skip
DRAWN_APART = (
    "AutoTP, bf16", "FSDP2 + DTensor, bf16, wrong clip", "Megatron stock, TP=2", "Megatron tree, TP=2",
    "DDP, float32 master",
)  # fmt: skip
STEPS = {"one-step-fp32": "float32", "one-step-bf16": "bfloat16"}


def page(settings: Any, results: Results) -> Page:
    """Question, answer, picture; one step, two data-parallel ranks, trainings."""
    runs = trainings(results)
    table = _training_table(runs)
    return Page(
        answer="Yes, up to rounding, as long as all keep weights, gradients and Adam's state in the same precision; "
        "bits are equal between two of them only by luck, and across tensor-parallel sizes only in Megatron under "
        "`patches`. Losses, norms and curves, which people compare, cannot see what goes wrong: compare gathered "
        "gradients, in float32, with biases that are not zero.",
        picture=Picture(_picture(runs), f"Left: {settings.steps} steps, two recipes of precision, all frameworks. "
                        "Right: how far a curve is from the one that it should equal; 0 is the lower edge."),
        blocks=[*_step_blocks(settings, results), *_data_blocks(results["two-data-ranks"]),
                *_training_blocks(settings, runs, table)],
        summary=[table],
    )  # fmt: skip


def _picture(runs: dict[str, dict[str, Any]]) -> bytes:
    with pyplot.rc_context(LOOK):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH * 1.6, 4.2), layout="constrained")
        for name, (colour, style) in CURVES.items():
            left.plot(runs[name]["losses"], style, color=COLOURS[colour], label=name, linewidth=1.3)
        left.set(title="loss", xlabel="step")
        _draw_apart(right, runs)
        for axes in (left, right):
            axes.legend(fontsize=6.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
            tidy(axes)
        return png(figure)


def _draw_apart(axes: Axes, runs: dict[str, dict[str, Any]]) -> None:
    floor = 1e-8
    for index, name in enumerate(DRAWN_APART):
        apart = [max(value, floor) for value in losses_apart(runs[name], runs[APART[name]])]
        axes.plot(apart, color=COLOURS[index], label=f"{name} – {APART[name]}", linewidth=1.1)
    axes.set(yscale="log", title="distance of two losses", xlabel="step")
    axes.set_ylim(bottom=floor)


def _distance_rows(step: dict[str, Any], *before: str) -> list[list[str]]:
    return [
        [*before, pair["a"], pair["b"], kind, f"{len(one['differing'])} of {one['tensors']}", f"{one['error']:.1e}",
         one["worst"], f"{one['norm']:.1e}", f"{one['max']:.1e}"]
        for pair in step["pairs"] for kind, one in pair["distances"].items()
    ]  # fmt: skip


DISTANCES = ("A", "B", "of", "differ", "worst error", "in", "norms apart", "max abs")


def _step_blocks(settings: Any, results: Results) -> list[Block]:
    steps = [(word, biases, step) for part, word in STEPS.items() for biases, step in results[part].items()]
    losses = [
        [name, *(f"{step['runs'][name]['losses'][0]:.8f}" if name in step["runs"] else "" for _, _, step in steps)]
        for name in results["one-step-bf16"]["random biases"]["runs"]
    ]  # fmt: skip
    distances = [row for word, biases, step in steps for row in _distance_rows(step, word, biases)]
    return [
        Heading("One step from the same weights"),
        Paragraph(
            f"A model of Qwen2.5-0.5B's kind: hidden size {settings.hidden_size}, {settings.intermediate_size} inside "
            f"the MLP, {settings.heads} heads, {settings.kv_heads} of keys and values, tied embeddings of "
            f"{settings.vocabulary} words, 2 layers; {settings.batch} samples of {settings.length} words a rank. All "
            "start from the same bfloat16 weights. `tpcheck.trace` records outputs, their gradients and parameters' "
            "gradients and puts them together from all ranks; Megatron's are held against Hugging Face's where both "
            "have them. Errors are norms of a difference relative to A's norm, of the worst tensor. `float32` is DDP "
            "on the same weights in float32: what bfloat16 should have given."
        ),
        Table(("run", *(f"{word}, {biases}" for word, biases, _ in steps)), losses, "Losses at DP=1"),
        _norm_table(results["one-step-bf16"]["random biases"], "outputs"),
        _norm_table(results["one-step-bf16"]["random biases"], "gradients of outputs"),
        Table(("precision", "biases", *DISTANCES), distances, "All distances", folded=True),
        Table(DISTANCES, _distance_rows(results["one-step-bf16"]["random biases"]), "bfloat16, random biases"),
        Paragraph(
            "AutoTP's column layer rounds x·W to bfloat16 and adds its bias to that; torch's linear, which DTensor "
            "leaves in place, adds it before rounding. So the two have equal bits while biases are zero, which is how "
            "Hugging Face draws them, and in float32 where the rounding happens to agree."
        ),
    ]


def _norm_table(step: dict[str, Any], kind: str) -> Table:
    names = list(next(iter(step["runs"].values()))["norms"][kind])
    rows = [[name, *(f"{run['norms'][kind][module]:.6g}" if module in run["norms"][kind] else "–" for module in names)]
            for name, run in step["runs"].items()]  # fmt: skip
    return Table(("run", *names), rows, f"Norms of {kind}, bfloat16, random biases")


def _data_blocks(step: dict[str, Any]) -> list[Block]:
    rows = [[name, *(f"{loss:.8f}" for loss in run["losses"])] for name, run in step["runs"].items()]
    replicas = [
        [pair["b"], kind, f"{len(one['unequal replicas'])} of {one['tensors']}"]
        for pair in step["pairs"] for kind, one in pair["distances"].items() if kind == "gradients of parameters"
    ]  # fmt: skip
    return [
        Heading("Two data-parallel ranks, and a sum of gradients that is missing"),
        Paragraph(
            "A forward pass needs nothing of the other data-parallel rank, so a rank's loss says nothing of the sum of "
            "gradients. The last run leaves out `fully_shard`, and with it that sum."
        ),
        Table(("run", "loss of rank 0", "loss of rank 1"), rows, "bfloat16, random biases"),
        Table(DISTANCES, _distance_rows(step), "Distances at DP=2"),
        Table(("run", "of", "differ between ranks that hold the same"), replicas, "Replicas that should be equal"),
    ]


def _training_table(runs: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, run in runs.items():
        losses, reference = run["losses"], APART.get(name)
        apart = max(losses_apart(run, runs[reference])) if reference else 0.0
        rows.append([
            name, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{min(losses):.4f}", f"{sum(losses) / len(losses):.4f}",
            reference or "–", f"{apart:.1e}" if reference else "–", f"{run['norms'][0]:.4f}", f"{run['moved']:.1%}",
        ])  # fmt: skip
    head = ("run", "first loss", "last", "least", "mean", "compared with", "farthest", "first norm", "weights moved")
    return Table(head, rows, "Trainings; weights moved: of those that the model holds, in the first step")


def _training_blocks(settings: Any, runs: dict[str, dict[str, Any]], table: Table) -> list[Block]:
    losses = zip_longest(*(run["losses"] for run in runs.values()))
    rows = [[str(step), *(f"{loss:.6f}" if loss else "" for loss in row)] for step, row in enumerate(losses)]
    return [
        Heading("Trainings, and what bends a curve"),
        Paragraph(
            f"{settings.steps} steps ({settings.short_steps} under `patches`) of AdamW, learning rate "
            f"1e-5, no weight decay, gradients clipped to norm 1, {settings.batch} samples of "
            f"{settings.training_length} "
            "Zipf-distributed words a rank, random biases. DP=1. Norms are added up in "
            "float64."
        ),
        table,
        Paragraph(
            "Weights in bfloat16 have 8 bits: an update of 1e-5 is less than half of their last bit for most, and is "
            "rounded away. A float32 master copy keeps it. Autocast is such a copy by another name: weights stay "
            "float32 and products are cast. Whoever has it on one side alone compares two optimizers. DeepSpeed keeps "
            "a master unless told otherwise, Megatron always does."
        ),
        Paragraph(
            "A clip needs the norm of the whole gradient: over tensor-parallel ranks, shards add up and replicas count "
            "once. Added up over all ranks blindly, norms and embeddings count twice, and every gradient is scaled "
            "down too far. Adam divides by the gradient's own size, so the curve hardly shows it; plain SGD would."
        ),
        Table(("step", *runs), rows, "All losses", folded=True),
    ]  # fmt: skip
