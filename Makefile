# SPDX-License-Identifier: Apache-2.0
# Each target is complete on a fresh machine: it makes .venv and installs what it needs. Set PYTHON to choose another
# interpreter. On a machine with a GPU install its build of torch into .venv first; it is kept.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.set-up

.PHONY: setup demo test test-all lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard sub-packages/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/megacell demo --out demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict --package megacell.store
	$(BIN)/mypy --package megacell.geneformer

test: lint
	$(BIN)/python -m pytest -m "not exhaustive"

test-all: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache
