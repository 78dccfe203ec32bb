"""Triton kernels for GPUs: sums and products of one fixed order, whatever the shape."""
