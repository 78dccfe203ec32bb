"""Triton kernels for a GPU: sums and products of one fixed order, whatever the shape.

`patches.order.backend` says what each name does; `patches.order.exact` has the same ones for a CPU.
"""

from __future__ import annotations

from patches.contract import Attention
from patches.order.kernels import cross_entropy
from patches.order.kernels.attention_checks import check_attention
from patches.order.kernels.attentions import attention, attention_gradient
from patches.order.kernels.bits import provenance
from patches.order.kernels.checks import check
from patches.order.kernels.embedding import embedding_gradient
from patches.order.kernels.gemm import add_product, add_product_in_units, product
from patches.order.kernels.grouped import add_grouped_products_in_units, grouped_product
from patches.order.kernels.norm import input_gradient, normalised
from patches.order.kernels.pairs import rounded
from patches.order.kernels.ranks import begin_reading_peers, check_symmetric_memory, rounded_tree_sum
from patches.order.kernels.softmaxes import softmax, softmax_gradient
from patches.order.kernels.squares import euclidean_norm
from patches.order.kernels.sums import row_sums, tree_of_gamma_gradients, tree_of_sums

__all__ = [
    "add_grouped_products_in_units",
    "add_product",
    "add_product_in_units",
    "attention",
    "attention_gradient",
    "attention_unless_named",
    "begin_reading_peers",
    "check",
    "check_attention",
    "check_symmetric_memory",
    "cross_entropy",
    "embedding_gradient",
    "euclidean_norm",
    "grouped_product",
    "input_gradient",
    "normalised",
    "product",
    "provenance",
    "rounded",
    "rounded_tree_sum",
    "row_sums",
    "softmax",
    "softmax_gradient",
    "tree_of_gamma_gradients",
    "tree_of_sums",
]

attention_unless_named: Attention = "blockwise"
