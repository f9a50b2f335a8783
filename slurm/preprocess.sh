#!/bin/bash
# Text to token files, a part of the inputs in each task of a job array; then one job joins them.
#
#   sbatch --array=0-15 slurm/preprocess.sh data/corpus --tokenizer=tokenizers/mine --append-eod -- texts/*.jsonl
#   sbatch --dependency=afterok:JOBID slurm/preprocess.sh --merge data/corpus     # JOBID as sbatch has said it
#
# The first argument is the prefix of the output. The tasks share the inputs, neighbours together, and task i
# writes PREFIX.part-i_text_document.bin and .idx; where that pair is there it does nothing, so that the same
# command again, with the whole array, does what is missing. PREFIX.parts says what the parts are made of, and another
# command is refused. --merge joins all of them to PREFIX_text_document, in the order of the inputs. Options between
# PREFIX and -- are tools/preprocess_data.py's; with --json-key=NAME the files are NAME's.

#SBATCH --job-name=preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue

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

if [[ ${1:-} == --merge ]]; then
    prefix=${2:-}
    [[ -n $prefix ]] || fail "no prefix: give that of the parts after --merge"
    [[ -f $prefix.parts ]] || fail "there is no $prefix.parts: preprocess the parts first"
    { read -r count && read -r key; } <"$prefix.parts"
    parts=()
    for ((part = 0; part < count; part++)); do
        parts+=("$prefix.part-${part}_${key}_document")
        [[ -f ${parts[part]}.idx ]] || fail "part $part of $count is not there (${parts[part]}.idx): submit the array again"
    done
    exec "$python" "${code}tools/merge_datasets.py" --input "${parts[@]}" --output-prefix "${prefix}_${key}_document"
fi

[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || fail "not a task of a job array: submit with sbatch --array=0-N"
prefix=${1:-}
[[ -n $prefix && $prefix != -* ]] || fail "the prefix of the output is '$prefix': it is the first argument"
shift
options=() key=text
while (($#)) && [[ $1 != -- ]]; do
    [[ $1 != --json-key ]] || fail "write --json-key=NAME: the parts are named by it"
    [[ $1 != --json-key=* ]] || key=${1#*=}
    options+=("$1")
    shift
done
(($#)) || fail "no inputs: they come after --"
shift
count=${SLURM_ARRAY_TASK_COUNT:-1} task=$SLURM_ARRAY_TASK_ID
((${SLURM_ARRAY_TASK_MIN:-0} == 0 && ${SLURM_ARRAY_TASK_MAX:-0} == count - 1)) ||
    fail "the array has $count tasks up to ${SLURM_ARRAY_TASK_MAX:-0}: give all of it, --array=0-N; what is there stays"
(($# >= count)) || fail "$# inputs for $count tasks: use --array=0-$(($# - 1))"

# All parts are of one cut: each task writes it down, or finds it as it would write it.
cut=$(printf '%s\n' "$count" "$key" ${options[@]+"${options[@]}"} -- "$@")
if [[ -f $prefix.parts && $(<"$prefix.parts") != "$cut" ]]; then
    fail "$prefix.parts is of other inputs, options or tasks: take another prefix, or remove it and $prefix.part-*"
fi
printf '%s\n' "$cut" >"$prefix.parts.$task"
mv "$prefix.parts.$task" "$prefix.parts"

first=$((task * $# / count)) past=$(((task + 1) * $# / count))
inputs=("${@:first+1:past-first}")
part=$prefix.part-$task
if [[ -f ${part}_${key}_document.idx ]]; then
    echo "${part}_${key}_document is there"
    exit
fi
exec "$python" "${code}tools/preprocess_data.py" --input "${inputs[@]}" --output-prefix "$part" \
    --workers "${SLURM_CPUS_PER_TASK:-1}" ${options[@]+"${options[@]}"}
