"""What tests share: ranks, models, checkpoints, traces, finished sweeps, a Slurm cluster."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BEFORE = ROOT / "tests" / "data" / "before"  # results of earlier commits
STAND_IN = ROOT / "tests" / "megatron_lm" / "stand_in"  # for a checkout of Megatron-LM
