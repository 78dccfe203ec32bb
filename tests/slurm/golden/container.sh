#!/bin/bash

# Parameters
#SBATCH --array=0-1%2
#SBATCH --chdir=/home/user/project
#SBATCH --job-name=qwen.0123abcd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='/shared/my results/qwen/slurm/qwen.0123abcd/%A_%a_0_log.out'
#SBATCH --partition=h100
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=240

# setup
output='/shared/my results/qwen'
cells=(stock-tp4 tree-tp4)
cell=$output/${cells[${SLURM_ARRAY_TASK_ID:-0}]}
requeue='/shared/my results/qwen/code/0123456789ab/slurm/requeue.sh'
# shellcheck source=/dev/null
if ! source "$requeue" || ! declare -F finish >/dev/null; then
    echo "tpcheck: cannot read $requeue, which queues jobs again: nothing is trained" >&2
    exit 1
fi
meet
export NCCL_DEBUG=WARN
begin "$cell" 10

# command
export SUBMITIT_EXECUTOR=slurm
srun --label --export=ALL --kill-on-bad-exit=1 '--container-image=nvcr.io#nvidia/nemo:25.09' '--container-mounts=/data:/data:ro,/shared/my results/qwen:/shared/my results/qwen' --container-env=NCCL_DEBUG --container-writable python '/shared/my results/qwen/code/0123456789ab' train "$cell/run.yaml" --resume &


# teardown
finish