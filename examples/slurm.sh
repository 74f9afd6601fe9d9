#!/bin/bash
# The paper's 512 pairs a step on two machines with 8 GPUs each: sbatch examples/slurm.sh, repeated until the run is done.
# Not tried on a cluster yet; the tests check its options and its shell.
#SBATCH --job-name=softmask
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
# Two minutes before the end Slurm sends SIGTERM: the run writes a checkpoint and ends; `resume: auto` continues from it.
# Data and output_dir are on a disk that all machines share.
set -euo pipefail
source .venv/bin/activate
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it from sbatch
srun sh -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec softmask-fast train --config examples/paper.yaml --batch_size 32'
