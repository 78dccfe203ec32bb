"""Sums and products in torch that no grouping, shape, thread count or BLAS can change: what a CPU computes with.

`patches.order.backend` says what each name does; `patches.order.kernels` has the same ones for a GPU.
"""

from __future__ import annotations

from patches.contract import Attention
from patches.order.exact.attentions import attention, attention_gradient, check_attention
from patches.order.exact.grouped import add_grouped_products_in_units, grouped_product
from patches.order.exact.norm import input_gradient, normalised, tree_of_gamma_gradients
from patches.order.exact.products import add_product, add_product_in_units, check, product, provenance
from patches.order.exact.ranks import begin_reading_peers, check_symmetric_memory, rounded_tree_sum
from patches.order.exact.slices import rounded
from patches.order.exact.softmaxes import softmax, softmax_gradient
from patches.order.exact.squares import euclidean_norm
from patches.order.exact.sums import exact_sum as row_sums
from patches.order.exact.sums import tree_of_sums

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

attention_unless_named: Attention = "unfused"
cross_entropy = None  # the softmax is kept for backward
embedding_gradient = None  # ATen's own adds a row's tokens in their order, whatever other rows there are
