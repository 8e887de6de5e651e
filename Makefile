# `make demo` and `make test` set up what they need in .venv. They need Python 3.11 or later and make.
# `make gpu` uses the python3 that is there, with its own torch, triton and cupy.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= build/gpu
BIN    := $(VENV)/bin

.PHONY: help setup demo test newest lint types format docs gpu bench suite step engines clean

help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## a virtual environment with kvfold and all that it can use

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvfold needs Python 3.11 or later; \
	$(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@

demo: setup  ## a simulation in which every row is checked, and a model that generates with kvfold
	$(BIN)/kvfold demo
	$(BIN)/python examples/generate.py

test: setup lint  ## lint, types, and all tests that need no GPU
	$(BIN)/pytest -n auto -m "not gpu"

newest: setup  ## the Triton tests with the newest Triton, whose CPU mode needs no GPU
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/newest triton
	PYTHONPATH=build/newest $(BIN)/pytest -n auto -m "not gpu" -k "not spill" \
	  tests/ops/*/test_*triton.py tests/adapters/sglang/test_sglang_metadata.py

lint: setup types  ## ruff, both ways, and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## write the tables of README and docs anew, and draw the plots
	$(BIN)/python docs/tables.py

gpu: SHELL := /bin/bash -o pipefail
gpu:  ## on a GPU: install without dependencies, GPU tests, demo, benchmarks
	@$(PYTHON) -c 'import sys, setuptools; v = setuptools.__version__; sys.exit(int(v.split(".")[0]) < 77 and \
	"an install without build isolation needs setuptools 77 or later; here is " + v)'
	mkdir -p $(OUT)
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m pytest -m gpu -n 14 --dist worksteal 2>&1 | tee $(OUT)/pytest.log
	$(PYTHON) -m kvfold.bench demo 2>&1 | tee $(OUT)/demo.log
	$(MAKE) bench

bench: suite step engines  ## on a GPU: all results that README and docs quote, into OUT

OPS := paged_kv_compress prefill_compress norm_rope_store paged_kv_compress_store prefill_compress_store locate_rows
suite:  ## on a GPU: the standard benchmark of each op
	mkdir -p $(OUT)
	for op in $(OPS); do $(PYTHON) -m kvfold.bench bench $$op --suite --json $(OUT)/$$op.json || exit 1; done
	$(PYTHON) -m kvfold.bench bench model-step --json $(OUT)/model_step.json

engines:  ## on a GPU: a model of transformers, and the adapters' host cost
	mkdir -p $(OUT)
	$(PYTHON) -m kvfold.bench bench transformers --json $(OUT)/transformers.json
	$(PYTHON) -m kvfold.bench bench adapters --json $(OUT)/adapters.json

step:  ## on a GPU: a whole decode step in four modes
	mkdir -p $(OUT)
	$(PYTHON) -m kvfold.bench step --json $(OUT)/step.json

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis
