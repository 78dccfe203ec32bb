#!/bin/bash

# Parameters
#SBATCH --array=0-1%2
#SBATCH --chdir=/home/user/project
#SBATCH --cpus-per-task=32
#SBATCH --gres=gpu:h100:8
#SBATCH --job-name=qwen.0123abcd
#SBATCH --no-requeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='/shared/my results/qwen/slurm/qwen.0123abcd/%A_%a_0_log.out'
#SBATCH --partition=h100
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
export CUDA_DEVICE_MAX_CONNECTIONS=1
begin "$cell" 0

# command
export SUBMITIT_EXECUTOR=slurm
# shellcheck disable=SC2016
srun --label --export=ALL --kill-on-bad-exit=1 --cpus-per-task=32 bash -c 'trap "" USR2; PET_NODE_RANK=$SLURM_NODEID exec "$@"' torchrun /venv/bin/python -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" '/shared/my results/qwen/code/0123456789ab' train "$cell/run.yaml" --resume &


# teardown
finish