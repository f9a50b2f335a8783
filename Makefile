# One command each, from a fresh machine with Python 3.11 or newer: `make help` lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-input -c constraints.txt

export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo laptop chat test test-slurm chaos bench bench-gpu readers lint clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

setup: $(READY)  ## create .venv with the pinned versions

demo: $(READY)  ## train a small Llama on 4 CPU processes, convert it to Hugging Face and let it speak
	@$(BIN)/python tools/demo.py

laptop: $(READY)  ## train a Llama of 2 million parameters on this machine's CPU until it writes English
	@$(BIN)/python tools/laptop.py

chat: $(READY)  ## lilLM's whole path, small: tokenizer, pre-training, fine-tuning, preference tuning, a conversation
	@$(BIN)/python tools/lillm.py

# Two files at a time, never two tests of a file: its cases share ranks that are started once.
test: $(READY)  ## run the whole test suite
	@$(BIN)/python -m pytest -q --durations=10 -n 2 --dist loadfile

FAULTS ?= 300

chaos: $(READY)  ## kill, stop and damage tiny runs, 300 faults or FAULTS=...; each must end as if nothing had been
	@$(BIN)/python -m tests.chaos.run --faults $(FAULTS)

test-slurm: $(READY)  ## test the scripts under a real Slurm of two nodes on this host; fails without its packages
	@$(BIN)/python -m pytest -q tests/slurm --require-slurm

bench: $(READY)  ## run the benchmarks, side by side with peers, and write docs/benchmarks.md with its plots
	@$(BIN)/python -m benchmarks.run

bench-gpu: $(READY)  ## training on one GPU beside transformers + DeepSpeed, in parts; PARTS=... for some of them
	@$(BIN)/python -m benchmarks.gpu $(PARTS)

readers: $(READY)  ## read exported folders with transformers 4 and 5 and with llama.cpp (downloads and builds them)
	@$(BIN)/python -m tests.readers.check

lint: $(READY)  ## check style, format, types and shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megalite launchers tools benchmarks
	$(BIN)/shellcheck -x .ci/run $(wildcard slurm/*.sh)

clean:  ## remove .venv and caches; runs/ and data/ stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# DeepSpeed's own set-up imports torch and its build tools, so they come first and it is built beside them.
$(READY): setup.py constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up .venv, once (minutes)"
	@$(PYTHON) -m venv .venv
	@echo "  1/4 torch"
	@$(PIP) torch
	@echo "  2/4 build tools"
	@$(PIP) setuptools wheel ninja numpy packaging psutil py-cpuinfo pydantic hjson msgpack tqdm einops
	@echo "  3/4 deepspeed"
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@echo "  4/4 megalite and its tools"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
