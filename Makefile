# The two commands of the README: `make quickstart` and `make test`. Both set up what they need in .venv.
#
#   make quickstart   train a small TACO BERT on real English, export it, load it with Hugging Face  (10 minutes, CPU)
#   make test         lint, types, and all tests but the longest
#   make check        lint, types and fast tests, before each commit
#   make check-other  fast tests of data work with Python 3.12 or 3.13 (OTHER_PYTHON), if it is here: without torch
#   make moves        continue a run of each layout in every other, and write the table of docs/parallelism.md
#   make sanitize     the C++ code and the tests of its extension under address, undefined-behaviour and thread sanitizers
#   make reliability  inject every fault that the tests know, and write the table of docs/reliability.md
#   make parity       compare layouts of up to four processes with one process, and write the table of docs/parallelism.md
#   make gpu          tests that need a GPU, on one
#   make gpu-bench    BERT-large's step on one GPU in many settings, within 6 minutes, into gpu-bench.jsonl
#   make soak         long tests; then random faults, for SECONDS (600) each, into preprocessing and a job: bytes compared

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3.11
VENV ?= .venv
RUN ?= runs/quickstart
BIN := $(VENV)/bin
# Each process takes neighbouring tests, so that what a module prepares is prepared once. Three of them on two cores: many
# tests wait, for SLURM, for a hang to be noticed, for a disk that is slow on purpose.
WORKERS := -n 3 --dist worksteal
CORPUS := data_tools/sample_corpus/public_domain_en.jsonl.zst

.PHONY: install quickstart test check check-other lint moves parity reliability sanitize soak gpu gpu-bench clean help

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

install: $(VENV)/.installed

# torch first and alone: with the CPU release in place no other package asks for the CUDA one.
$(VENV)/.installed: constraints.txt pyproject.toml setup.py $(shell find csrc -name "*.[ch]pp")
	@for tool in $(PYTHON) g++; do command -v $$tool >/dev/null || \
	    { echo "error: $$tool is missing; on Debian: apt-get install python3.11 python3.11-venv python3.11-dev g++" >&2; exit 1; }; done
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3.11-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	    { echo "error: Python.h of $(PYTHON) is missing; on Debian: apt-get install python3.11-dev" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel pybind11 -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[test]'
	touch $@

# The tests run the GPU kernels in Triton's interpreter. The package is large, and nothing else needs it on a CPU.
$(VENV)/.triton: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet triton -c constraints.txt
	touch $@

# -- quickstart: each line is a command that a user types on a corpus of their own -------------------------------------

quickstart: install
	@echo "== 1/5 vocabulary"
	@test -e $(RUN)/vocab.txt || $(BIN)/python data_tools/train_tokenizer.py --input $(CORPUS) --output $(RUN)/vocab.txt \
	    --kind wordpiece --vocab-size 4000 --hash-range 0:0.95
	@echo "== 2/5 datasets"
	@test -e $(RUN)/data/train.json || $(BIN)/python data_tools/preprocess.py --input $(CORPUS) --tokenizer $(RUN)/vocab.txt \
	    --output-prefix $(RUN)/data/train --hash-range 0:0.95 --workers 2
	@test -e $(RUN)/data/validation.json || $(BIN)/python data_tools/preprocess.py --input $(CORPUS) \
	    --tokenizer $(RUN)/vocab.txt --output-prefix $(RUN)/data/validation --hash-range 0.95:1 --workers 2
	@echo "== 3/5 training: 2 processes, DeepSpeed ZeRO-1"
	@OMP_NUM_THREADS=1 $(BIN)/taco train --config configs/taco_tiny.yaml --processes 2
	@$(BIN)/taco report $(RUN)/taco_tiny
	@echo "== 4/5 export to Hugging Face"
	@$(BIN)/taco export $(RUN)/taco_tiny $(RUN)/export --overwrite
	@echo "== 5/5 loaded with AutoModelForMaskedLM and AutoTokenizer"
	@$(BIN)/taco fill-mask $(RUN)/export \
	    "he opened the [MASK] and went into the room ." \
	    "it was one [MASK] the most beautiful things in the world ." \
	    "she did not know what she was going to [MASK] ."

# -- tests -------------------------------------------------------------------------------------------------------------

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint $(VENV)/.triton
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow"

test: lint $(VENV)/.triton
	$(BIN)/python -m pytest -q $(WORKERS) -m "not soak" --durations=40

check-other:
	@PYTEST_OPTIONS="$(WORKERS)" tests/other_python.sh $(OTHER_PYTHON)

parity: install
	$(BIN)/python tests/distributed/parity_table.py

# In build/sanitize; the extension that is in use stays as it is.
sanitize: install
	csrc/tests/sanitize.sh address
	csrc/tests/sanitize.sh thread
	PYTHON=$(BIN)/python csrc/tests/sanitize.sh extension tests/data

moves: install
	$(BIN)/python tests/distributed/moves_table.py

reliability: install
	$(BIN)/python tests/faults/reliability_table.py

soak: install
	$(BIN)/python -m pytest -q -m soak
	$(BIN)/python tests/soak/soak_preprocess.py --seconds $(or $(SECONDS),600)
	$(BIN)/python tests/soak/soak_train.py --seconds $(or $(SECONDS),600) --write

# Needs the CUDA release of torch (README), so it installs nothing: GPU_PYTHON=... names another interpreter than .venv's.
gpu:
	DS_ACCELERATOR=cuda $(or $(GPU_PYTHON),$(BIN)/python) -m pytest tests/gpu -q -rA -n 4

# The same interpreter as for `make gpu`. MINUTES=... changes the deadline.
gpu-bench:
	DS_ACCELERATOR=cuda $(or $(GPU_PYTHON),$(BIN)/python) -m pretrain.bench.gpu --minutes $(or $(MINUTES),6) --out gpu-bench.jsonl

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
