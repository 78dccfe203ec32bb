#!/bin/bash

# Parameters
#SBATCH --chdir=/home/user/project
#SBATCH --constraint=h100
#SBATCH --cpus-per-task=1
#SBATCH --job-name=qwen.0123abcd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output='/shared/my results/qwen/slurm/qwen.0123abcd/%j_0_log.out'
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=240

# setup
output='/shared/my results/qwen'
cells=(tree-tp2)
cell=$output/${cells[${SLURM_ARRAY_TASK_ID:-0}]}
requeue='/shared/my results/qwen/code/0123456789ab/slurm/requeue.sh'
# shellcheck source=/dev/null
if ! source "$requeue" || ! declare -F finish >/dev/null; then
    echo "tpcheck: cannot read $requeue, which queues jobs again: nothing is trained" >&2
    exit 1
fi
meet
begin "$cell" 10

# command
export SUBMITIT_EXECUTOR=slurm
srun --label --export=ALL --kill-on-bad-exit=1 --cpus-per-task=1 /venv/bin/python '/shared/my results/qwen/code/0123456789ab' train "$cell/run.yaml" --resume &


# teardown
finish