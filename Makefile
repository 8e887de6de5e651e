# `make demo` and `make test` set up everything they need in .venv (python3 and make suffice).
# `make gpu` uses the python3 that is there, with its own torch, triton and cupy.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= build/gpu
BIN    := $(VENV)/bin

.PHONY: help setup demo test lint format gpu bench step kernels clean

help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## a virtual environment with kvfold and all it can use

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@

demo: setup  ## a decode simulation, every emitted row checked
	$(BIN)/kvfold demo

test: setup lint  ## lint, format check and all tests that need no GPU
	$(BIN)/pytest -n auto -m "not gpu"

lint: setup  ## ruff, both ways
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: SHELL := /bin/bash -o pipefail
gpu:  ## on a GPU: install without dependencies, GPU tests, demo, the production benchmark
	mkdir -p $(OUT)
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m pytest -m gpu -n 14 --dist worksteal 2>&1 | tee $(OUT)/pytest.log
	$(PYTHON) -m kvfold.bench.cli demo 2>&1 | tee $(OUT)/demo.log
	$(MAKE) bench

BENCH = $(PYTHON) -m kvfold.bench --prefetch-state --json $(OUT)/h200.json
R4    = --compress-ratio 4 --scenario all-hit --batch 16,64,128,256,512

bench: kernels step  ## on a GPU: all of bench/results but the profile, into OUT

step:  ## on a GPU: a whole decode step, four ways
	mkdir -p $(OUT)
	$(PYTHON) -m kvfold.bench.cli step --json $(OUT)/h200_step.json --plot $(OUT)/h200_step.png

kernels:  ## on a GPU: the kernels against the memory's speed
	mkdir -p $(OUT)
	$(BENCH) --baseline --plot $(OUT)/h200.png
	$(BENCH) --append --batch 32
	$(BENCH) --append --scenario all-hit --page-size 128
	$(BENCH) --append --scenario all-hit --layout packed
	$(BENCH) --append --state-dtype bf16 --batch 16,64,128,256,512
	$(BENCH) --append $(R4) --next-n 1
	$(BENCH) --append $(R4) --next-n 4
	$(BENCH) --append $(R4) --next-n 1 --head-dim 128
	$(BENCH) --append $(R4) --next-n 4 --head-dim 128
	$(BENCH) --append --batch 16,128,256,512 --override backend=triton --override reduce_warps=4 \
	  --override head_slice=32 --override min_ctas=5 --override schedule=direct
	$(PYTHON) -m kvfold.bench --from $(OUT)/h200.json --plot $(OUT)/h200_all.png

clean:  ## what the other targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
