"""Checkpoints as logical tensors: read without executing anything, digested, compared."""
