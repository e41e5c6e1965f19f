# Each target makes .venv when it is missing: Python 3.11 or newer, make and the package index are all it takes.
PYTHON ?= python3
BIN := .venv/bin

# Workers side by side, one thread each (tests/conftest.py); a file's tests stay together, and so do its fixtures.
WORKERS := -n logical --maxprocesses 4 --dist loadfile

.PHONY: demo test test-slow test-all lint format clean

demo: .venv/installed
	$(BIN)/pldr demo

# The fast tests, which every change is tried with. The slow ones start processes of their own, and so run alone.
test: .venv/installed
	$(BIN)/python -m pytest -q -m "not slow" $(WORKERS)

test-slow: .venv/installed
	$(BIN)/python -m pytest -q -m slow

test-all: test test-slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by its exact version: whatever build of it the index serves for this machine (see CONTRIBUTING.md).
.venv/installed: pyproject.toml constraints-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "pldr needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-output
