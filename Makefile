# `make demo` and `make test` set up everything they need in .venv (python3 and make suffice).
# `make gpu` uses the python3 that is there, with its own torch, triton and cupy.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= build/gpu
BIN    := $(VENV)/bin

.PHONY: help setup demo test lint format gpu clean

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
	$(PYTHON) -m pytest -m gpu -n 8 2>&1 | tee $(OUT)/pytest.log
	$(PYTHON) -m kvfold.bench.cli demo 2>&1 | tee $(OUT)/demo.log
	$(PYTHON) -m kvfold.bench --baseline --json $(OUT)/h200.json --plot $(OUT)/h200.png

clean:  ## what the other targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
