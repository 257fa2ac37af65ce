#!/bin/bash
# 2 nodes of 8 GPUs under Slurm: one process a GPU. Stops before its time is over, requeues itself and goes on.
#   sbatch slurm.sh gpt2 --data.source /shared/text.jsonl --data.dir /shared/data --train.micro-batch 240 --run-dir /shared/runs/gpt2
# What follows the script is for `nanogpt-jax train`. /shared: a file system that all nodes see.
#SBATCH --job-name=nanogpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=nanogpt-%j.log
# No --gpus-per-task: JAX gives task i of a node the i-th of its GPUs, so each task must see them all.
# --signal without B: Slurm sends SIGTERM to the processes, and not to this script. They save, all at the same step.
set -euo pipefail
most=${MAX_RESTARTS:-50} # how often this job may start again

# here, if your shell has not done it before sbatch: module load ..., source .../bin/activate

# A lost process ends the others within 40 s, by themselves and with their own words, so srun need not kill them at
# once. It kills whatever is left after a minute.
code=0
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    nanogpt-jax train "$@" --mesh.processes auto || code=$?

# srun ends with the highest code of all: 75 if all were stopped, 128 and more if one was killed
if ((code == 75 || code > 128)); then
    if ((${SLURM_RESTART_COUNT:-0} < most)); then
        echo "slurm.sh: code $code, again"
        scontrol requeue "$SLURM_JOB_ID"
        exit
    fi
    echo "slurm.sh: code $code, but this job has started again $most times (MAX_RESTARTS): the same sbatch goes on" >&2
fi
exit "$code"
