#!/bin/bash
# Submit a script of this folder with the code and configurations of this moment: they are frozen into the run's
# folder, so that a job that waits, or is queued again, runs what was submitted.
#
#   slurm/submit.sh RUN_DIR [--replace] [OPTIONS OF SBATCH] slurm/SCRIPT.sh ARGUMENTS...
#   slurm/submit.sh runs/7b --time=24:00:00 slurm/pretrain_7b.sh data.train=data/corpus_text_document
#
# RUN_DIR/code receives megalite, launchers, tools, slurm, configs, the commit, and the files that --config and
# --deepspeed_config name. The job still starts in the current folder: other paths, and .venv, are as they are here.
# Training scripts write into RUN_DIR, and the log is RUN_DIR/JOBNAME-JOBID.log. Where RUN_DIR/code has other
# content it is refused; --replace puts the new code there, also under jobs that wait. Options of sbatch are
# written --name=value.

set -euo pipefail

if [[ ! -f slurm/start.sh ]]; then
    echo "error: slurm/start.sh is not in $PWD: submit from the root of the checkout" >&2
    exit 2
fi
# shellcheck source=slurm/start.sh
source slurm/start.sh

run_dir=${1:-}
[[ -n $run_dir && $run_dir != -* && $run_dir != *.sh ]] ||
    fail "RUN_DIR is '$run_dir': slurm/submit.sh RUN_DIR [OPTIONS OF SBATCH] slurm/SCRIPT.sh ARGUMENTS..."
shift
replace=false options=()
while (($#)) && [[ $1 == -* ]]; do
    if [[ $1 == --replace ]]; then replace=true; else options+=("$1"); fi
    shift
done
script=${1:-}
[[ $script == slurm/*.sh && -f $script ]] ||
    fail "'$script' is no script of slurm/: options of sbatch are --name=value, then comes slurm/SCRIPT.sh"
shift

mkdir -p "$run_dir"
run_dir=$(cd "$run_dir" && pwd)
aside=$(mktemp -d "$run_dir/.code.XXXXXX")
trap 'rm -rf "$aside"' EXIT
tar --exclude=__pycache__ -cf - megalite launchers tools slurm configs | tar -xf - -C "$aside"
commit >"$aside/COMMIT"

# A configuration that an argument names is frozen too, and the argument names the copy.
arguments=() is_config=false
for argument in "$@"; do
    path=${argument#--*config=}
    if { $is_config || [[ $path != "$argument" ]]; } && [[ -f $path ]]; then
        mkdir -p "$aside/given"
        cp "$path" "$aside/given/"
        argument=${argument%"$path"}$run_dir/code/given/${path##*/}
    fi
    is_config=false
    [[ $argument == --config || $argument == --deepspeed_config ]] && is_config=true
    arguments+=("$argument")
done

changed=
[[ ! -e $run_dir/code ]] || changed=$(diff -qr --exclude=__pycache__ --exclude=COMMIT "$aside" "$run_dir/code") || true
if [[ -n $changed ]]; then
    $replace || fail "$run_dir/code has other content: $(echo "${changed//"$aside"/"$PWD"}" | sed -n 1p):" \
        "choose another RUN_DIR, or give --replace"
    rm -rf "$run_dir/code"
fi
[[ -e $run_dir/code ]] || mv "$aside" "$run_dir/code"
chmod 755 "$run_dir/code" # mktemp made it for its owner alone

export MEGALITE_ROOT=$run_dir/code MEGALITE_RUN_DIR=$run_dir
sbatch --output="$run_dir/%x-%j.log" ${options[@]+"${options[@]}"} "$MEGALITE_ROOT/$script" \
    ${arguments[@]+"${arguments[@]}"}
