# The README's commands. Everything runs inside .venv, which the first of them makes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: serve test check bench clean

serve: $(STAMP)  ## a real answer from a real model on http://127.0.0.1:8000
	@exec $(BIN)/trtserve serve $(ARGS)

# Two at a time, a file's tests in one of the two, where they share servers and engines. More would be too much for the
# tests that bound times, on a machine with few cores. ARGS="-n 0 …" runs them in one process, as plain pytest does.
test: $(STAMP) check  ## the whole suite
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(STAMP)  ## format, lint, types, import rules, the Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

bench: $(STAMP)  ## the figures of the README that need no other program
	$(BIN)/python bench/server.py
	$(BIN)/python bench/engine.py

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trtserve needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo "installing trtserve with its embedded engine (a few minutes the first time) ..."
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[embedded,ucx,dev]'
	$(BIN)/pip install --quiet --no-deps 'nixl-cu12>=1.5,<2'  # its metadata would bring a CUDA build of torch
	$(BIN)/pip install --quiet --target $(VENV)/openai-2 'openai<3'  # for a test beside openai 3
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
