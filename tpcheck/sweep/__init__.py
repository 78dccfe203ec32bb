"""Many runs of one matrix, on this machine, and the verdict on them."""
