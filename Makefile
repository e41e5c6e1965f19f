# Each target makes .venv when it is missing: Python 3.11 or newer, make and the package index are all it takes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format clean

demo: .venv/installed
	$(BIN)/pldr demo

test: .venv/installed
	$(BIN)/python -m pytest -q

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
