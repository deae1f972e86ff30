#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --time=24:00:00 --signal=TERM@120
#
# GPT-2 124M on several machines that share --data_dir and --out_dir (not tried yet, for want of a cluster). From the
# root of the repository, in an environment where torchrun is found, and again when the time is up, to resume:
#
#     sbatch assets/slurm.sh
#
# Two minutes before the end of its time, the run ends its step, saves a checkpoint and stops: --signal sends SIGTERM to
# torchrun, which passes it on, and waits TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds for the ranks. (SIGUSR1 stops a run as
# well, but torchrun passes it on only with --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1.)
#
# Without Slurm, run these two lines on each of two machines. Only the machine that the endpoint names must stay up; if
# the other is lost, all wait, and start again from the newest checkpoint once its torchrun is started again:
#
#     export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#     torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 --rdzv_backend=c10d --rdzv_id=1 --rdzv_endpoint=FIRST_HOST:29500 train_gpt2.py
#
# The variable is needed for --max-restarts: without it, ranks that are started again
# look for each other where those before them were (github.com/pytorch/pytorch/issues/135712), so train_gpt2.py ends
# such a job at its start, with a line that says so.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:29500" train_gpt2.py
