"""ATen's own kernels, made independent of shape where TP changes shapes."""
