"""Tensor parallelism against one rank: which layers differ, by how much, and is that too much?

weights   are initial weights the same?              columns     one rank's product as TP narrows it
stack     pairs of layers on top of each other       isolated-*  one column- or row-parallel layer
layers-*  a whole model, forward and backward        tree-*      the same under the patches
bugs      what a tolerance lets pass                 orders      in which order sums are added
machine   attention and environment
"""

from __future__ import annotations

import functools

from tpcheck.study.study import Part, Study
from tpcheck.study.tp_vs_dp import layers
from tpcheck.study.tp_vs_dp.findings import findings
from tpcheck.study.tp_vs_dp.isolated import columns, isolated
from tpcheck.study.tp_vs_dp.machine import machine
from tpcheck.study.tp_vs_dp.orders import found_orders
from tpcheck.study.tp_vs_dp.page import page
from tpcheck.study.tp_vs_dp.settings import TpVsDp
from tpcheck.study.tp_vs_dp.stack import stack
from tpcheck.study.tp_vs_dp.weights import weights

__all__ = ["STUDY"]

MODEL = ("layers", "hidden", "heads", "head_dim", "model_ffn", "vocabulary", "seq_length")

STUDY = Study(
    name="tp-vs-dp",
    question="Which layers does tensor parallelism change, by how much, and is it too much?",
    settings=TpVsDp,
    requires=(),
    memory_gib=TpVsDp.gib,
    parts=(
        Part("weights", weights, MODEL),
        Part("columns", columns, ("seq_length",)),
        Part("isolated-bf16", functools.partial(isolated, "bf16"), ("tokens", "hidden", "ffn")),
        Part("isolated-fp32", functools.partial(isolated, "fp32"), ("tokens", "hidden", "ffn")),
        Part("stack", stack, ("stacked_tokens", "hidden", "ffn", "stacked")),
        Part("orders", found_orders, ("seq_length",)),
        Part("layers-fp32", functools.partial(layers.stock, "fp32"), MODEL),
        Part("layers-bf16", functools.partial(layers.stock, "bf16"), MODEL),
        Part("tree-fp32", functools.partial(layers.tree, "fp32"), MODEL),
        Part("tree-bf16", functools.partial(layers.tree, "bf16"), MODEL),
        Part("bugs", layers.bugs, MODEL),
        Part("machine", machine, MODEL),
    ),
    page=page,
    findings=findings,
)
