"""The sums themselves, in torch and, on a GPU, Triton; without Megatron or Transformer Engine."""
