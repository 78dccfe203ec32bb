"""The name of every file that tpcheck writes, by the directory it is in: batch scripts and users know them."""

from __future__ import annotations

# A result directory: one run, or one cell of a sweep (`files.result_dir`).
MANIFEST = "manifest.json"
STEPS = "steps.jsonl"
DIGESTS = "digests.json"
CHECKPOINTS = "checkpoints"
LOG = "log.txt"  # rank 0 holds its lock as long as it trains
TRACE = "trace"  # a folder: see below

# Beside it, in a cell.
RUN = "run.yaml"  # the cell's configuration, resolved
LOCK = ".lock"  # held while the cell is run here; in a sweep's directory, while the sweep is called
EXIT_REASONS = "ends.jsonl"  # why ranks ended, for the batch script
ATTEMPTS = "attempts.jsonl"  # a line whenever Slurm starts the cell, written by the batch script
CANCELLED = "cancelled"  # by `tpcheck cancel`: the cell must not queue again by itself

# A sweep's directory, which holds its cells.
SWEEP = "sweep.json"
VERDICT = "verdict.json"
PICTURE, PAGE = "loss.png", "index.html"
LOCAL_JOBS = "jobs"  # output of cells that run here, until all are complete
SUBMISSIONS = "submissions.jsonl"
CELLS = "cells.txt"  # the cells' names in the order of the array, for sweep.sbatch
SLURM_JOBS = "slurm"  # submitted scripts and what jobs print
SNAPSHOTS = "code"  # copies of the packages that jobs run
CODE = "code.json"  # in such a copy: what it was made from

# A study's folder, beside a record of each of its parts (`tpcheck.study.record`).
STUDY_PAGE, STUDY_PICTURE, STUDY_README = "page.html", "picture.png", "README.md"

# A trace's rank-00000 (`tpcheck.trace`).
RANK = "rank.json"
RECORDS = "records.jsonl"
SETTINGS = "settings.jsonl"
NUDGED = "noise-"  # and a seed: folders of the same run with every rounding nudged, beside the ranks' or in the result
