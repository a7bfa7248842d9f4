# SPDX-License-Identifier: Apache-2.0
# Needs Python 3.10 or newer, make and a network; the first run of a target makes its environment.
include pins.env

VENV := .venv
VENV_NEWEST := .venv-newest
# make train ARGS="--fresh", make test ARGS="-k bridge"
ARGS ?=
# make properties EXAMPLES=10000 SEED=7; the seed of the day is printed.
EXAMPLES ?= 1000
SEED ?= $(shell date +%Y%m%d)
# The interpreter of .venv; empty: tools/find_python.sh looks for one.
PYTHON ?=
export PYTHON

.PHONY: help train train-audio train-vqa test test-newest parity parity-nightly mutants properties reshape faults models bench plan-check gpu-check setup lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done
	@echo '  Options: ARGS="..." is passed on (train: to the job, test: to pytest);'
	@echo '  PYTHON=/path/to/python3 chooses the interpreter.'

train: ## train the digits job on 8 ranks, results in runs/digits
	@python=$$(sh tools/find_python.sh base) && sh tools/setup_venv.sh $(VENV) examples "$$python"
	@$(VENV)/bin/python examples/mimo/digits/train.py $(ARGS)

train-audio: ## the same on images and spoken digits, two encoders; results in runs/digits-audio
	@python=$$(sh tools/find_python.sh base) && sh tools/setup_venv.sh $(VENV) examples "$$python"
	@$(VENV)/bin/python examples/mimo/digits/train.py --audio tp=1,dp=8 --steps 1000 \
		--out runs/digits-audio $(ARGS)

train-vqa: setup ## train a LLaVA from scratch on easy-VQA, then ask it all held-out questions
	@$(VENV)/bin/mimo train easy-vqa $(ARGS)

setup: ## make .venv with all that train and test need
	@python=$$(sh tools/find_python.sh base) && \
		sh tools/setup_venv.sh $(VENV) examples,test "$$python"

lint: setup ## check the style (ruff), which rooms import which (import-linter), types (pyright)
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python tools/check_layers.py >/dev/null || $(VENV)/bin/python tools/check_layers.py
	@$(VENV)/bin/python tools/check_types.py

test: lint ## check the style, then run all tests
	@$(VENV)/bin/python -m pytest $(ARGS)

test-newest: ## the same in .venv-newest: Python >= 3.12 with the newest megatron-core
	@python=$$(PYTHON= sh tools/find_python.sh newest) && \
		sh tools/setup_venv.sh $(VENV_NEWEST) examples,test "$$python"
	@$(VENV_NEWEST)/bin/python -m ruff check .
	@$(VENV_NEWEST)/bin/python -m pytest $(ARGS)

mutants: setup ## break the code in many small ways; every break must be noticed by a test
	@$(VENV)/bin/python -m tests.mutants $(ARGS)

properties: setup ## the property tests on EXAMPLES (1000) random layouts each, drawn from SEED
	@echo "Examples $(EXAMPLES), seed $(SEED)"
	@PROPERTY_EXAMPLES=$(EXAMPLES) $(VENV)/bin/python -m pytest --hypothesis-seed=$(SEED) \
		tests/unit_tests/mimo/test_*_properties.py $(ARGS)

parity: setup ## compare parallel runs with one process: every gradient, weights, losses
	@$(VENV)/bin/python -m tests.parity $(ARGS)

parity-nightly: setup ## the same for every pair of 8-rank layouts; run again to resume
	@$(VENV)/bin/python -m tests.parity --nightly $(ARGS)

reshape: setup ## checkpoints from one layout to another, then killed saves; ARGS=--all: every pair
	@$(VENV)/bin/python -m tests.reshape $(ARGS)
	@MIMO_KILLS=20 $(VENV)/bin/python -m pytest -q -s tests/functional/test_killed_saves.py

faults: setup ## kill and stop ranks in every phase; ARGS="--cases 50 --seed 1", --docs
	@$(VENV)/bin/python -W ignore -m tests.faults $(ARGS)

models: setup ## models from Hugging Face folders against transformers; ARGS="--only llama", --docs
	@$(VENV)/bin/python -W ignore -m tests.imported $(ARGS)

plan-check: setup ## the planner against published steps: errors of time and of gains, each row left out too
	@$(VENV)/bin/python -W ignore -m benchmarks.plan_check $(ARGS)

bench: setup ## measure the bridges: bytes, time, memory, overlap, the whole step; ARGS="--quick"
	@$(VENV)/bin/python -W ignore -m benchmarks $(ARGS)

gpu-check: setup ## what only GPUs can show, on those that are there; ARGS=--docs
	@$(VENV)/bin/python -W ignore -m tests.gpus $(ARGS)

clean: ## remove the environments and caches; runs/ stays, it is yours
	rm -rf $(VENV) $(VENV_NEWEST) *.egg-info build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
