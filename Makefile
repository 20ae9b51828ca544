# Everything works on a machine that has Python 3.11 or newer and make: what is needed is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check clean

demo: .venv/installed
	$(BIN)/python benchmarks/demo.py

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"  # 25.1: the first that installs dependency groups
	$(BIN)/python -m pip install --editable . --group dev
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs
