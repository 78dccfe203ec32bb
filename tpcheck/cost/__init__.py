"""What a training step takes on paper: FLOPs, bytes, memory."""
