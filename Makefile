# make setup | test | test-kernels | test-slow | test-times | mutants | demo | lint | types | docs | clean.
# Nothing is assumed but a Python of 3.11 to 3.13 with its venv module.

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Without kept bytecode every worker rewrites every test, and every process that a test starts compiles popax.
unexport PYTHONDONTWRITEBYTECODE

# The newest interpreter that runs, is of 3.11 to 3.13 and can make virtual environments (a name on PATH may be a broken
# shim).
USABLE := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
CANDIDATES := python3.13 python3.12 python3.11 python3 python
PYTHON ?= $(shell for name in $(CANDIDATES); do \
	if $$name -c '$(USABLE)' >/dev/null 2>&1; then command -v $$name; break; fi; done)

.PHONY: help setup test test-kernels test-slow test-times accept-kernels accept-kills accept-catalog mutants demo lint format types docs clean
.DEFAULT_GOAL := help

help:
	@echo 'make setup   a virtual environment in $(VENV) with popax and its development tools'
	@echo 'make test    the test suite (ARGS= goes to pytest), without the kernels and without what takes long'
	@echo '             make test-kernels: the kernels; make test-slow: what takes longer, of both'
	@echo '             make test-times: CPU seconds by file, of the suite and the kernels (ARGS=--write-slow: tests/slow.txt anew)'
	@echo 'make accept-kernels | accept-kills | accept-catalog'
	@echo '             tests at their whole size, a cell each; what has passed at this commit is not run again'
	@echo '             (docs/acceptance; ARGS=--list shows the cells)'
	@echo 'make mutants do the tests see mistakes? (ARGS= goes to python -m tests.mutation)'
	@echo 'make demo    the demonstration (ARGS= goes to popax demo)'
	@echo 'make lint    ruff; make format rewrites; make types runs pyright'
	@echo 'make docs    the documentation, warnings are errors'
	@echo 'make clean   removes what these commands made, $(VENV) included'

setup: $(VENV)/.installed-dev

PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

test: $(VENV)/.installed-dev
	$(PYTEST) -m 'not slow and not kernels' $(ARGS)

test-kernels: $(VENV)/.installed-dev
	$(PYTEST) -m 'kernels and not slow' $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m 'slow and not aot and not parity' $(ARGS)

test-times: $(VENV)/.installed-dev
	$(PYTEST) -p tests.cpu_times -m 'not slow' $(ARGS)

accept-kernels: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet -e '.[aot]'
	$(BIN)/python -m tests.acceptance kernels $(ARGS)

accept-kills accept-catalog: accept-%: $(VENV)/.installed-dev
	$(BIN)/python -m tests.acceptance $* $(ARGS)

mutants: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutation $(ARGS)

demo: $(VENV)/.installed-run
	$(BIN)/popax demo $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

clean:
	rm -rf $(VENV) .venv-newest build dist docs/_build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@if [ -z '$(PYTHON)' ]; then \
		echo 'popax needs Python 3.11 to 3.13 with venv and ensurepip; none of $(CANDIDATES) is one.' >&2; \
		echo 'Install one (on Debian and Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python3.12 ...' >&2; \
		exit 1; fi
	@'$(PYTHON)' -c '$(USABLE)' || { \
		echo "popax needs Python 3.11 to 3.13 with venv and ensurepip; $(PYTHON) is $$('$(PYTHON)' --version 2>&1)." >&2; exit 1; }
	'$(PYTHON)' -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# A stamp for each set of extras: installed again only when pyproject.toml changes.
$(VENV)/.installed-run: EXTRAS :=
$(VENV)/.installed-dev: EXTRAS := [dev]
$(VENV)/.installed-docs: EXTRAS := [docs]
$(VENV)/.installed-run $(VENV)/.installed-dev $(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.$(EXTRAS)'
	@touch $@
