"""Launching the proof: sweep files, and what a cluster needs to know to run them.

`slurm/sweeps/*.yaml` are sweep files for `tpcheck sweep`: one base run times a matrix of settings.
The same file runs on a laptop and on a cluster.
"""
