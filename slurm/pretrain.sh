#!/bin/bash
# Train a run of configs/runs on A100 nodes: one task per GPU, started by srun.
#
#   sbatch slurm/pretrain.sh CONFIG                               # from the root of the checkout
#   sbatch slurm/pretrain.sh CONFIG schedule.num_steps=10         # overrides of the run
#   sbatch slurm/pretrain.sh CONFIG --deepspeed_config other.json
#   sbatch --nodes=8 --job-name=CONFIG --partition=a100 --account=me --time=24:00:00 slurm/pretrain.sh CONFIG
#
# CONFIG is a name: the run is configs/runs/CONFIG.yaml, with configs/deepspeed/CONFIG.json or, where there is
# none, zero3_bf16.json. Options before the script are sbatch's and win over the #SBATCH lines below. Arguments
# after CONFIG are launchers/pretrain.py's and win over its files: options first, then overrides.
# Inside `salloc` (with the same options) run it as `slurm/pretrain.sh CONFIG ...`. See docs/slurm.md.

#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log

set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job: submit with sbatch, or run inside salloc"
[[ -n ${SLURM_NTASKS:-} ]] || fail "the job has no number of tasks: give --ntasks-per-node, one task per GPU"
# sbatch runs a copy of this file from a spool folder, in the folder it was submitted from.
[[ -f launchers/pretrain.py ]] ||
    fail "launchers/pretrain.py is not in $PWD: submit from the root of the checkout, or with sbatch --chdir=ROOT"

name=${1:-}
if [[ -z $name || ! -f configs/runs/$name.yaml ]]; then
    known=(configs/runs/*.yaml)
    known=("${known[@]##*/}")
    fail "CONFIG '$name' is not a name in configs/runs: give one of ${known[*]%.yaml} as the first argument"
fi
deepspeed_config=configs/deepspeed/$name.json
[[ -f $deepspeed_config ]] || deepspeed_config=configs/deepspeed/zero3_bf16.json

python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python

command=("$python" launchers/pretrain.py
    --deepspeed_config "$deepspeed_config"
    --config "configs/runs/$name.yaml"
    "${@:2}") # of an option given twice, the last one counts

# Rendezvous: rank 0 runs on the first node. Its NodeAddr is the address Slurm itself uses, and is
# the host name unless the site says otherwise; it is right where host names do not resolve (cloud
# nodes, containers). Sites may hide nodes from users (PrivateData=nodes): then the name has to do.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
node_addr=$(scontrol show node --oneliner "$first_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || node_addr=
export MASTER_ADDR=${node_addr:-$first_node}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # own to the job; below the ports the kernel hands out

# Each task gets an equal share of its node's cores; srun would give it one.
tasks_per_node=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
cpus_per_node=${SLURM_JOB_CPUS_PER_NODE%%[(,]*} # "128(x2)" -> 128
cpus_per_task=${SLURM_CPUS_PER_TASK:-$((cpus_per_node / tasks_per_node))}
((cpus_per_task > 0)) || cpus_per_task=1

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_task} # ranks of one node must not fight for cores
export CUDA_DEVICE_MAX_CONNECTIONS=1                      # kernels start in issue order: communication overlaps
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                     # NCCL says why it failed, and no more
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3                  # a failed collective ends its rank, and does not hang
export PYTHONFAULTHANDLER=1                               # a crash in native code leaves a Python stack
export PYTHONUNBUFFERED=1                                 # the log is current
ulimit -S -l hard                                         # InfiniBand pins memory: as much as the site allows

echo "job        $SLURM_JOB_ID ($SLURM_JOB_NAME)"
echo "nodes      $SLURM_JOB_NODELIST ($SLURM_JOB_NUM_NODES nodes, $SLURM_NTASKS tasks, $cpus_per_task CPUs each)"
echo "rendezvous $MASTER_ADDR:$MASTER_PORT"
echo "commit     $(git describe --always --dirty 2>/dev/null || echo unknown)"
printf 'command   %s\n' "$(printf ' %q' "${command[@]}")"

# --kill-on-bad-exit and --wait: without them a crashed rank leaves the others hanging in a running job.
# --distribution: consecutive ranks share a node, where tensor-parallel neighbours belong, and a socket.
# Every task sees all GPUs of its node, as NCCL's peer-to-peer copies need; LOCAL_RANK picks its own.
# shellcheck disable=SC2016 # the variables are the task's, not this shell's
srun --kill-on-bad-exit=1 --wait=60 --cpus-per-task="$cpus_per_task" --distribution=block:block \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' task "${command[@]}"
