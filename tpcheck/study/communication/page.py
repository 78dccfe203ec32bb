"""The page of `communication`."""

from __future__ import annotations

from collections.abc import Iterator

from tpcheck.study.communication import drawings
from tpcheck.study.communication.findings import case, mean_losses, millions
from tpcheck.study.communication.settings import SIZES, Communication
from tpcheck.study.page import Block, Heading, Page, Paragraph, Picture, Table
from tpcheck.study.study import Results
from tpcheck.study.text import percent, small

__all__ = ["page"]

MIB = 2**20


def page(settings: Communication, results: Results) -> Page:
    """Counted first, then what it is for, then what can be dropped."""
    four, message = case(results, 4), 2 * settings.seq_length * settings.hidden
    losses = results["spd"]["losses"]["4"]
    answer = (
        f"Two all-reduces a layer forward and two backward, of {message / MIB:.1f} MiB each here, and a few more "
        f"around the layers: {four['sent'] / MIB:.0f} MiB a rank and step at TP=4, just as `tpcheck cost` says. "
        "Sequence parallelism sends no less; dropping attention's sums does, at a price that the loss shows "
        f"({losses[-1] / losses[0] - 1:+.2%} with all of them), and makes of every TP size another model."
    )
    caption = (
        "A block on two ranks, upwards. f and g are where ranks meet: f in front of what is cut by columns, g behind "
        "what is cut by rows."
    )
    blocks = [*_counts(settings, results), *_times(settings, results), *_model(results), *_sequence(results),
              *_dropped(settings, results), *_sums(settings, results)]  # fmt: skip
    return Page(
        answer,
        Picture(drawings.sites(message), caption),
        blocks,
        [Heading("A step"), _steps(results), _losses(results)],
    )


def _counts(settings: Communication, results: Results) -> Iterator[Block]:
    yield Heading("Collectives, counted")
    yield Paragraph(
        f"Megatron's GPT with {settings.layers} layers of hidden size {settings.hidden}, one sequence of "
        f"{settings.seq_length} tokens, bfloat16, forward, backward and optimizer, on gloo ranks. Every collective is "
        "seen where torch dispatches it. A rank sends 2·(t-1)/t of an all-reduce's bytes, and half of that of the "
        "others. TP=8 does not divide 12 heads: there the model has 16 of 48, with the same parameters and the same "
        "messages."
    )
    yield _steps(results)
    rows = [[("with" if one["sp"] else "without") + " SP", row["phase"], f"{row['count']} × {row['name']}",
             f"{row['bytes'] / MIB:.2f} MiB"] for one in (case(results, 4), case(results, 4, True))
            for row in one["layer"] if row["phase"] != "step"]  # fmt: skip
    yield Table(
        ("", "phase", "collectives", "each, whole tensor"), rows, "of one layer: what two layers have more than one"
    )
    rows = [[f"TP={one['tp']}" + ", SP" * one["sp"], row["phase"], f"{row['count']} × {row['name']}", str(row["bytes"])]
            for one in results["collectives"]["cases"] for row in one["step"]]  # fmt: skip
    yield Table(("", "phase", "collectives", "bytes each"), rows, "All collectives of a step", folded=True)


def _steps(results: Results) -> Table:
    rows = []
    for one in results["collectives"]["cases"]:
        forward, backward = (
            sum(row["count"] for row in one["layer"] if row["phase"] == phase) for phase in ("forward", "backward")
        )
        mib = [f"{one['layer_sent'][phase] / MIB:.2f}" for phase in ("forward", "backward")]
        whole = [str(sum(row["count"] for row in one["step"])), f"{one['sent']:.0f}", f"{one['on_paper']:.0f}"]
        rows.append([f"TP={one['tp']}" + ", SP" * one["sp"], str(forward), str(backward), *mib, *whole])
    headings = ("", "a layer: forward", "backward", "MiB sent forward", "backward", "a step: collectives",
                "bytes sent, counted", "`tpcheck cost`")  # fmt: skip
    return Table(headings, rows, "collectives of a layer and of a whole step, per rank; SP: sequence parallelism")


def _times(settings: Communication, results: Results) -> Iterator[Block]:
    yield Heading("Their time on this machine")
    rows = results["times"]["collectives"]
    yield Paragraph(
        f"Each alone, at a layer's size, {settings.seq_length} × {settings.hidden}: the median of {settings.repeats}, "
        "gloo over loopback. More ranks than cores wait for each other to be scheduled: from TP=4 on, a core here has "
        "several ranks, and the figures say more of the machine's load than of the collective."
    )
    yield Picture(drawings.times(rows), "milliseconds of each collective by TP size")
    sizes = [[row["name"], row["dtype"], f"{row['bytes'] / MIB:.2f} MiB"] for row in rows if row["tp"] == 2]
    cells = [[*one, *(f"{row['ms']:.2f}" for tp in SIZES[1:] for row in rows
                      if (row["tp"], row["name"], row["dtype"]) == (tp, one[0], one[1]))] for one in sizes]  # fmt: skip
    yield Table(("", "dtype", "whole tensor", *(f"TP={tp}, ms" for tp in SIZES[1:])), cells)


def _model(results: Results) -> Iterator[Block]:
    found = results["loss"]
    yield Heading("The model, and the loss it starts with")
    whole, positions = found["parameters"], found["positions"]
    yield Paragraph(
        f"{whole} parameters, {millions(whole)}; {positions} of them are learned positions, and "
        f"{millions(whole - positions)} is what is left. A logit is the product of the last norm's output, of length "
        "√d, with an embedding, so it is normal with variance d·σ², and the loss of any token is ln V + d·σ²/2 = "
        f"{found['ln_v'] + found['spread']:.3f}. Where the model is asked for its own input, and embedding and output "
        "are one matrix, the residual stream still holds the answer's embedding: its logit is higher, and the loss "
        "lower by as much, before anything has been learned."
    )
    yield _losses(results)


def _losses(results: Results) -> Table:
    rows = []
    for tied in (True, False):
        n = mean_losses(results, tied)
        derived = results["loss"]["ln_v"] + results["loss"]["spread"]
        numbers = n["same"], n["derived"] if tied else derived, n["next"], derived
        rows.append(["tied" if tied else "untied", *(f"{number:.3f}" for number in numbers)])
    headings = ("", "target: the input", "derived", "target: the next token", "derived")
    count = len({row["seed"] for row in results["loss"]["losses"]})
    return Table(headings, rows, f"initial loss, mean of {count} seeds, random tokens; the analysis had 9.93")


def _sequence(results: Results) -> Iterator[Block]:
    plain, sequence = case(results, 4), case(results, 4, True)
    yield Heading("Sequence parallelism")
    yield Paragraph(
        "Between the two halves of a block ranks then hold a part of the tokens, so that g is a reduce-scatter and f "
        "an all-gather. They move what the all-reduce moved; backward, Megatron gathers the inputs of column-parallel "
        f"layers again instead of keeping them. In all {sequence['sent'] / plain['sent']:.2f} times the bytes of the "
        "step at TP=4, for activations that are a quarter outside the cut layers."
    )


def _dropped(settings: Communication, results: Results) -> Iterator[Block]:
    found = results["spd"]
    curve = found["curve"]
    none, worst = (max(ends) - min(ends) for ends in zip(*((one[0], one[-1]) for one in found["losses"].values()),
                                                         strict=True))  # fmt: skip
    yield Heading("Sync-point drop")
    yield Paragraph(
        "[SPD](https://arxiv.org/abs/2502.20727) leaves attention's all-reduce out of chosen blocks when a model is "
        f"used. Here {settings.trained_layers} layers of hidden size {settings.trained_hidden}, trained on text for "
        f"{settings.steps} steps with every sum in place (loss {curve[0]:.2f} to {curve[-1]:.2f}), are evaluated in "
        "float32 with blocks dropped: a rank's MLP sees the output of its own heads alone, and what attention found is "
        "added with the MLP's sum. This is our reading of the abstract, a wrapper inside this study; the paper's own "
        "has more to it, and its model was large and trained for long."
    )
    yield Picture(drawings.dropped(results), "Loss against blocks dropped, and of each block alone")
    rows = [[str(count), *(f"{found['losses'][str(tp)][count]:.6f}" for tp in SIZES),
             f"{found['losses']['4'][count] / found['losses']['4'][0] - 1:+.3%}"]
            for count in range(settings.trained_layers + 1)]  # fmt: skip
    yield Table(("blocks dropped", *(f"TP={tp}" for tp in SIZES), "TP=4, relative"), rows, f"order: {found['order']}")
    yield Paragraph(
        "At TP=1 nothing is dropped, as no sum is cut: its losses are the same, but for the place where the sum is "
        "added. At every other size the dropped model is a function of how many ranks there are, and no fixed order of "
        f"sums could make them equal: with every block dropped the losses are {worst:.0e} apart, with none {none:.0e}. "
        "The patches therefore know no such block: whoever serves a model with SPD compares TP sizes as different "
        "models."
    )


def _sums(settings: Communication, results: Results) -> Iterator[Block]:
    yield Heading("Sums in float32, in bfloat16, by the tree")
    yield Paragraph(
        f"fc2's product, {settings.seq_length} tokens, {4 * settings.hidden} features to {settings.hidden}, added over "
        "ranks: bfloat16 parts by an all-reduce, as stock Megatron does; float32 parts by an all-reduce; the tree's "
        "float32 roots by an all-to-all, rounded once, then gathered. The error is against float64; rounding its "
        f"result to bfloat16 alone costs {small(results['sums']['rounding'])}."
    )
    rows = [[f"TP={row['tp']}", row["how"], f"{row['sent_per_element']:.2f}", small(row["relative"]),
             percent(row["differing"] / row["size"])] for row in results["sums"]["rows"]]  # fmt: skip
    yield Table(("", "sum", "bytes sent per element", "relative error", "differ from TP=1"), rows)
