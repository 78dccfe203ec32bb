"""Exact arithmetic in torch: sums and products that no grouping, shape or thread count can change."""
