"""Differentiable parallel layers on top of `patches.order`; they know process groups, but not Megatron or TE."""
