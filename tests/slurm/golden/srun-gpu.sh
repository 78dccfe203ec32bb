#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-1%2
#SBATCH --chdir=/home/user/project
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --job-name=qwen.0123abcd
#SBATCH --mail-type=END,FAIL
#SBATCH --mem=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='/shared/my results/qwen/slurm/qwen.0123abcd/%A_%a_0_log.out'
#SBATCH --partition=h100
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=240

# setup
set -e
module load cuda/12.8
export HF_HOME="$HOME/hf"
set +e
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
export GREETING='it'"'"'s 5 o'"'"'clock'
begin "$cell" 10

# command
export SUBMITIT_EXECUTOR=slurm
srun --label --export=ALL --kill-on-bad-exit=1 --cpu-bind=none /venv/bin/python '/shared/my results/qwen/code/0123456789ab' train "$cell/run.yaml" --resume &


# teardown
finish