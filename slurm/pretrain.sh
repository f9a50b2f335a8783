#!/bin/bash
# Train a run of configs/runs on A100 nodes, whatever its task: one process per GPU, started by srun.
#
#   sbatch slurm/pretrain.sh CONFIG                               # from the root of the checkout
#   sbatch slurm/pretrain.sh CONFIG schedule.num_steps=10         # overrides of the run
#   sbatch slurm/pretrain.sh CONFIG --deepspeed_config other.json
#   sbatch --nodes=8 --job-name=CONFIG --partition=a100 --account=me --time=24:00:00 slurm/pretrain.sh CONFIG
#
# CONFIG is a name: the run is configs/runs/CONFIG.yaml, with configs/deepspeed/CONFIG.json or, where there is
# none, zero3_bf16.json. The launcher is that of the run's `task`, launchers/pretrain.py where it names none.
# Options before the script are sbatch's and win over the #SBATCH lines below. Arguments after CONFIG are the
# launcher's and win over its files: options first, then overrides.
# Inside `salloc` (with the same options) run it as `slurm/pretrain.sh CONFIG ...`. See docs/slurm.md.

#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

set -euo pipefail

# sbatch runs a copy of this file from a spool folder, in the folder it was submitted from.
if [[ ! -f ${MEGALITE_ROOT:-.}/slurm/start.sh ]]; then
    echo "error: slurm/start.sh is not in ${MEGALITE_ROOT:-$PWD}: submit from the root of the checkout, or with" \
        "sbatch --chdir=ROOT" >&2
    exit 2
fi
# shellcheck source=slurm/start.sh
source "${MEGALITE_ROOT:-.}/slurm/start.sh"
require_job
[[ -n ${SLURM_NTASKS:-} ]] || fail "the job has no number of tasks: give --ntasks-per-node, one task per GPU"

name=${1:-}
if [[ -z $name || ! -f ${code}configs/runs/$name.yaml ]]; then
    known=("${code}"configs/runs/*.yaml)
    known=("${known[@]##*/}")
    fail "CONFIG '$name' is not a name in configs/runs: give one of ${known[*]%.yaml} as the first argument"
fi
deepspeed_config=${code}configs/deepspeed/$name.json
[[ -f $deepspeed_config ]] || deepspeed_config=${code}configs/deepspeed/zero3_bf16.json

# The launcher is that of the run's task.
task=$(sed -n 's/^task: *\([a-z]*\).*/\1/p' "${code}configs/runs/$name.yaml")
task=${task:-pretrain}

run=(--deepspeed_config "$deepspeed_config"
    --config "${code}configs/runs/$name.yaml"
    stop.after_starts=3 # a run that dies each time before it saves is not started for ever
    ${MEGALITE_RUN_DIR:+"output_dir=$MEGALITE_RUN_DIR"} # slurm/submit.sh has put the code there
    "${@:2}") # of what is given twice, the last one counts
command=("$python" "${code}launchers/$task.py" "${run[@]}")

# Rendezvous: rank 0 runs on the first node. Its NodeAddr is the address Slurm itself uses, and is
# the host name unless the site says otherwise; it is right where host names do not resolve (cloud
# nodes, containers). Sites may hide nodes from users (PrivateData=nodes): then the name has to do.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
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

echo "job        $SLURM_JOB_ID ($SLURM_JOB_NAME)${SLURM_RESTART_COUNT:+, start $((SLURM_RESTART_COUNT + 1))}"
echo "nodes      $SLURM_JOB_NODELIST ($SLURM_JOB_NUM_NODES nodes, $SLURM_NTASKS tasks, $cpus_per_task CPUs each)"
echo "rendezvous $MASTER_ADDR:$MASTER_PORT"
echo "commit     $(commit)"
printf 'command   %s\n' "$(printf ' %q' "${command[@]}")"

# A mistake in the command is told here, once, and before any GPU is used.
RANK=0 LOCAL_RANK=0 WORLD_SIZE=$SLURM_NTASKS "${command[@]}" --check

# Slurm's warning that the time limit is near comes to this shell alone. It goes on to the ranks, which save,
# and end with status 75; until they listen to it, it must not end them.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# --distribution: consecutive ranks share a node, where tensor-parallel neighbours belong, and a socket.
# Every task sees all GPUs of its node, as NCCL's peer-to-peer copies need; LOCAL_RANK picks its own.
on_ranks=(srun --cpus-per-task="$cpus_per_task" --distribution=block:block)
# shellcheck disable=SC2016 # the variables are the task's, not this shell's
as_rank=(bash -c 'trap "" USR1; RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' task)

can_requeue() { # only a batch job can be queued again
    scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q 'Requeue=1.* BatchFlag=1'
}

# The nodes are looked at before they train; a rank that dies meanwhile is named by the others, so it ends none.
if [[ ${PREFLIGHT:-1} != 0 ]]; then
    bad_nodes=$PWD/.preflight-$SLURM_JOB_ID
    rm -f "$bad_nodes"
    checked=0
    "${on_ranks[@]}" --kill-on-bad-exit=0 --wait=120 "${as_rank[@]}" "$python" "${code}tools/preflight.py" \
        --task "$task" --nodes "${nodes//$'\n'/,}" --bad-nodes "$bad_nodes" "${run[@]}" || checked=$?
    bad=
    [[ -s $bad_nodes ]] && bad=$(paste -sd, "$bad_nodes") checked=77
    rm -f "$bad_nodes"
    if [[ -n $bad ]] && can_requeue; then
        echo "status 77: queued again, without $bad"
        excluded=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
        [[ $excluded != "(null)" ]] || excluded=
        trap "" TERM # by which Slurm ends this shell once the job is queued; before that it can exclude no node
        scontrol requeue "$SLURM_JOB_ID"
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${excluded:+$excluded,}$bad"
        exit 77
    elif ((checked)); then
        echo "status $checked: the preflight failed${bad:+ on $bad}; nothing was trained"
        exit "$checked"
    fi
fi

# --kill-on-bad-exit and --wait: without them a crashed rank leaves the others hanging in a running job.
"${on_ranks[@]}" --kill-on-bad-exit=1 --wait=60 "${as_rank[@]}" "${command[@]}" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do wait "$step" || status=$?; done # the trap interrupts a wait
status=0
wait "$step" || status=$?

# What the statuses mean is in docs/slurm.md.
case $status in
0) echo "finished" ;;
2 | 74 | 93) echo "status $status: not queued again, since it would end the same way" ;;
*)
    if can_requeue; then
        echo "status $status: queued again, to go on from the newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID" # ends this shell
        sleep 60
    fi
    ;;
esac
exit "$status"
