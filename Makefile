# `make demo` and `make test` set up everything they need in .venv (through uv where it is installed, else venv + pip).
VENV ?= .venv
BIN := $(VENV)/bin
JAX ?=
EXTRAS ?= dev
RUNS ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest lint format types bench bench-formats exhaustive clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(VENV)/.installed  ## make .venv with everything `make test` needs

$(VENV)/.installed: pyproject.toml
	@VENV="$(VENV)" EXTRAS="$(EXTRAS)" JAX="$(JAX)" sh .ci/setup.sh
	@touch $@

demo: setup  ## train a tiny model in bf16, fp8, nvfp4 and quartet2; print the table, draw the curves
	$(BIN)/python -m experiments.demo --workdir=$(RUNS)

test: setup  ## the test suite (without the tests marked slow)
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m "not slow" --ignore=tests/multidevice
	$(BIN)/python -m pytest -m "not slow" tests/multidevice

test-all: setup  ## the test suite with the slow tests
	$(BIN)/python -m pytest -n 2 --dist=worksteal --ignore=tests/multidevice
	$(BIN)/python -m pytest tests/multidevice

test-oldest:  ## the test suite on the oldest supported jax (0.11.2), in .venv-oldest
	$(MAKE) test VENV=.venv-oldest JAX=0.11.2

lint: setup  ## ruff (rules and formatting) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## step-time ratios to float32 on this machine
	$(BIN)/python -m benchmarks.step_time

bench-formats: setup  ## time of rounding, coding and packing as ratios to one pass over the array
	$(BIN)/python -m benchmarks.formats

exhaustive: setup  ## all 2^32 float32 numbers against the native casts (minutes; goes on where it was stopped)
	$(BIN)/python tests/exhaustive/check.py

clean:  ## remove what make built (runs are kept)
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
