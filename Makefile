# `make demo` and `make test` are all that a fresh clone needs: python3 (3.11 or newer) and make.
# The first of them makes .venv and downloads the packages; torch is a few GB.
#
#   make test VENV=/some/environment     use an environment that is already there
#   make test PYTHON=python3.12          make .venv with that Python

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.featstore-installed
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format bench clean

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

setup: $(STAMP) ## Make the environment and install everything into it.

# Only the default environment is ours to fill; another one is used as it is.
ifeq ($(VENV),.venv)
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "featstore needs Python 3.11 or newer. $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing the packages into $(VENV); PyTorch is a few GB the first time.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,dev]'
	@touch $@
else
$(STAMP): ;
endif

demo: $(STAMP) ## Extract, train and compare on ray-cast rooms.
	$(BIN)/python -m cli.featstore_app demo --out demo

# In the order of the files: with those of most tests first, README's minutes would come alone last.
test: $(STAMP) ## Run the fast tests.
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(STAMP) ## Run the tests that take minutes each.
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP) ## Check style and types.
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

format: $(STAMP) ## Put the code into the one format.
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

bench: $(STAMP) ## Run every benchmark; each prints one JSON line.
	@set -e; for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file; done

clean: ## Remove what the other targets made, the environment excepted.
	rm -rf demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
