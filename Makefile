# Every command of a contributor. `make` lists them. Needs make and Python >= 3.11; uv is fetched where there is none.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
UV_VERSION := 0.13.9
PYTEST_ARGS ?=
MODEL ?= qwen3-8b
CTX ?= 32768
ARGS ?=

# A uv of one's own, else a private one in .tools/.
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
# The interpreter is the user's; uv must not fetch another.
export UV_PYTHON_DOWNLOADS := never
VENV := .venv/bin

# The heavy environment lies outside the clone, named by what is in it, so that a second run costs nothing.
LIVE_PINS := tests/live/requirements.txt tests/live/overrides.txt
LIVE_KEY := $(shell { $(PYTHON) -V || true; cat $(LIVE_PINS) || true; } 2>/dev/null | cksum | cut -d" " -f1)
LIVE_ENV := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tonnage/live-$(LIVE_KEY)
LIVE_PYTHON := HF_HUB_OFFLINE=1 PYTHONPATH=. $(LIVE_ENV)/bin/python

E2E_TESTS := $(shell find tests/e2e -name 'test_*.py' 2>/dev/null)
BENCHMARKS := $(sort $(wildcard benchmarks/*.py))
ORACLES := $(sort $(wildcard tests/oracles/*.py))
DOC_SCRIPTS := $(sort $(wildcard scripts/docs*.py))
CHECKED := $(wildcard planner infra workloads tests benchmarks scripts)

.PHONY: help size golden setup check lint types unit format test live e2e calibrate bench oracles docs clean .live-env .python

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

size: | $(UV) .python  ## answer a question from nothing: make size MODEL=qwen3-8b CTX=8k,32k ARGS="--task serve"
	@$(UV) run --quiet --frozen --isolated --no-default-groups --python "$$(command -v $(PYTHON))" planner size --model $(MODEL) --ctx $(CTX) $(ARGS)

setup: .venv/.synced  ## make .venv with everything but the heavy frameworks

check: lint types unit  ## format, lint, types and unit tests, in seconds: before every commit

lint: .venv/.synced  ## format and lint rules (ruff)
	$(VENV)/ruff format --check $(CHECKED)
	$(VENV)/ruff check $(CHECKED)

types: .venv/.synced  ## types (mypy, strict)
	$(VENV)/mypy

unit: .venv/.synced  ## the unit tests alone
	$(VENV)/python -m pytest -n auto tests/unit $(PYTEST_ARGS)

format: .venv/.synced  ## put the code in its format, fix what can be fixed
	$(VENV)/ruff check --fix --exit-zero --quiet $(CHECKED)
	$(VENV)/ruff format $(CHECKED)

test: lint types  ## set up and run all that needs only Python packages
	$(VENV)/python -m pytest -n auto tests --ignore=tests/live --ignore=tests/e2e --ignore=tests/gpu $(PYTEST_ARGS)

# -W default: the frameworks warn of their own affairs when they are imported, which is no error of ours.
live: .live-env  ## run the tests that need torch, transformers, peft, TRL or vLLM (6 GB the first time)
	$(LIVE_PYTHON) -m pytest -W default -m live tests/live $(PYTEST_ARGS)

e2e: .venv/.synced  ## run the tests against real engines, where there are any
ifeq ($(E2E_TESTS),)
	@echo "make e2e: tests/e2e holds no tests yet, so nothing was run"
else
	@$(UV) sync --frozen --quiet --group e2e --python "$$(command -v $(PYTHON))"
	$(VENV)/python -m pytest -m e2e tests/e2e $(PYTEST_ARGS)
endif

calibrate: .venv/.synced  ## fit the speeds to the measurements again, each source left out in turn (minutes)
	PYTHONPATH=. $(VENV)/python scripts/calibrate_training.py --write
	PYTHONPATH=. OMP_NUM_THREADS=1 $(VENV)/python scripts/calibrate_serving.py

bench: .venv/.synced  ## time the planner (benchmarks/*.py)
	@test -n "$(BENCHMARKS)" || echo "make bench: benchmarks/ holds no script yet, so nothing was timed"
	@for script in $(BENCHMARKS); do echo "== $$script"; PYTHONPATH=. $(VENV)/python $$script; done

oracles: .live-env  ## rebuild the tables of tests/oracles from torch, transformers and vLLM
	@test -n "$(ORACLES)" || echo "make oracles: tests/oracles holds no script yet, so nothing was rebuilt"
	@for script in $(ORACLES); do echo "== $$script"; $(LIVE_PYTHON) $$script; done

docs: .venv/.synced  ## rebuild the generated pages of docs/
	@test -n "$(DOC_SCRIPTS)" || echo "make docs: no page is generated yet, so nothing was rebuilt"
	@for script in $(DOC_SCRIPTS); do echo "== $$script"; PYTHONPATH=. $(VENV)/python $$script; done

golden: .venv/.synced  ## rebuild the outputs that tests compare with (tests/golden)
	PYTHONPATH=. $(VENV)/python scripts/golden.py

clean:  ## remove what the other commands made in the clone
	rm -rf .venv .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.synced: pyproject.toml uv.lock | $(UV) .python
	$(UV) sync --frozen --quiet --python "$$(command -v $(PYTHON))"
	@# both write the bytecode that they need
	@PYTHONDONTWRITEBYTECODE= $(VENV)/planner size --model qwen3-8b --ctx 8k >/dev/null
	@PYTHONDONTWRITEBYTECODE= $(VENV)/planner preview --stack dev-32k >/dev/null
	@touch $@

.tools/bin/uv: | .python
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install its venv package (on Debian and Ubuntu python3-venv) or uv" >&2; exit 2; }
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or newer, or say make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), but Tonnage needs Python 3.11 or newer: say make PYTHON=/path/to/python" >&2; exit 2; }

# Not a file target: its recipe must see that the environment is whole, and it may be half made by an interrupted run.
.live-env: | $(UV) .python
	@test -e $(LIVE_ENV)/.ready || { \
	  set -x; rm -rf $(LIVE_ENV); \
	  $(UV) venv --quiet --python "$$(command -v $(PYTHON))" $(LIVE_ENV); \
	  $(UV) pip install --quiet --python $(LIVE_ENV)/bin/python -r tests/live/requirements.txt --override tests/live/overrides.txt; \
	  $(UV) pip uninstall --quiet --python $(LIVE_ENV)/bin/python torchvision torchaudio torchcodec; \
	  touch $(LIVE_ENV)/.ready; }
