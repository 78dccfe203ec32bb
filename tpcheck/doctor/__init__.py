"""Whether this machine can keep the promise for a run."""
