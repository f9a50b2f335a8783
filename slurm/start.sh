# shellcheck shell=bash
# Sourced by the scripts beside it, in a job or before one: the Python that runs, and the code that it takes.
#
# `code` is the folder that slurm/submit.sh has frozen, with a slash at its end, or empty: the current one.

fail() {
    echo "error: $*" >&2
    exit 2
}

python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python
export python

code=${MEGALITE_ROOT:+$MEGALITE_ROOT/}
export PYTHONPATH=${MEGALITE_ROOT:-$PWD}${PYTHONPATH:+:$PYTHONPATH} # before what is installed in the environment

# What runs, for the log.
commit() {
    cat "${code}COMMIT" 2>/dev/null || git describe --always --dirty 2>/dev/null || echo unknown
}

require_job() {
    [[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job: submit with sbatch, or run inside salloc"
}
