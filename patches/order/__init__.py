"""The sums themselves: pure torch, without Megatron or Transformer Engine."""
