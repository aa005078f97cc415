# SPDX-License-Identifier: Apache-2.0
# Each target is complete on a fresh machine: it makes .venv and installs what it needs. Set PYTHON to choose another
# interpreter. On a machine with a GPU install its build of torch into .venv first; it is kept.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.set-up
TESTS_AT_ONCE ?= 2

.PHONY: setup demo docs rooms test test-all test-hostile test-cuda lint clean bench-peers bench-store bench-batches bench-train bench-steps bench-compiled bench-scaling bench-embed

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard sub-packages/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,docs]'
	touch $@

demo: setup
	$(BIN)/megacell demo --out demo

docs: setup
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build
	@echo "open docs/_build/index.html"

# The drawing and the list of rooms in docs/architecture.md, after files have moved or their docstrings have changed.
rooms: setup
	$(BIN)/python docs/draw_rooms.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict --package megacell.core --package megacell.store --package megacell.training
	$(BIN)/mypy --package megacell.geneformer
	$(BIN)/mypy benchmarks

# On every machine the tests run on the CPU, and those of a GPU by a target of their own.
test: lint
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile -m "not exhaustive"

test-all: lint
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile

# Commands killed and given failing disks at their calls, and hostile inputs: a table, and 1 if anything is lost. Needs gcc.
HOSTILE ?=

test-hostile: setup
	CUDA_VISIBLE_DEVICES= $(BIN)/python tests/hostile/watch.py --at-once $(TESTS_AT_ONCE) $(HOSTILE)

test-cuda: setup
	$(BIN)/python -m pytest -m cuda

# Environments of the peers that the benchmarks compare with; see benchmarks/README.md. annbatch needs Python 3.12.
PEERS := .peers
PYTHON312 ?= python3.12
DATA ?= $(or $(MEGACELL_TEST_DATA),../shared/data)

bench-peers: $(PEERS)/scdl/.set-up $(PEERS)/geneformer/.set-up
	if $(PYTHON312) --version; then $(MAKE) $(PEERS)/annbatch/.set-up; else echo "annbatch will not be measured"; fi

$(PEERS)/scdl/.set-up:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet bionemo-scdl==0.1.3 torch==2.13.0 anndata==0.12.19
	touch $@

$(PEERS)/annbatch/.set-up:
	$(PYTHON312) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet annbatch==0.3.1 zarrs==0.2.3 numba==0.68.1
	touch $@

$(PEERS)/geneformer/.set-up:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps helical==2.2.0
	$(@D)/bin/python -m pip install --quiet datasets==3.6.0 numpy==2.2.6 pandas==2.2.2 scipy==1.13.1 anndata==0.12.19 \
	  scanpy==1.11.5 torch==2.13.0 transformers==4.57.6 accelerate==1.14.0 scikit-learn==1.7.2
	touch $@

bench-store: setup
	$(BIN)/python benchmarks/store.py --json benchmarks/results/store.json \
	  $(if $(wildcard $(PEERS)/scdl/.set-up),--scdl-python $(PEERS)/scdl/bin/python) \
	  $(if $(wildcard $(PEERS)/annbatch/.set-up),--annbatch-python $(PEERS)/annbatch/bin/python)

bench-batches: setup
	$(BIN)/python benchmarks/batches.py $(DATA)/cells $(DATA)/geneformer/V2 --json benchmarks/results/batches.json \
	  $(if $(wildcard $(PEERS)/geneformer/.set-up),--tokenizer-python $(PEERS)/geneformer/bin/python)

TRAIN ?= batch.cells=16

bench-train: setup
	$(BIN)/python benchmarks/train.py $(DATA)/cells $(DATA)/geneformer/V2 model=geneformer_10m $(TRAIN) \
	  --warmup 1 --seconds 60 --json benchmarks/results/train.json --chart benchmarks/results/train.png

bench-steps: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training_steps.py $(DATA)/cells $(DATA)/geneformer/V2 \
	  model=geneformer_10m batch.cells=8 --json benchmarks/results/training_steps.json

bench-compiled: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compiled.py $(DATA)/cells $(DATA)/geneformer/V2 model=geneformer_10m \
	  batch.cells=8 --json benchmarks/results/compiled.json

bench-scaling: setup
	$(BIN)/python benchmarks/scaling.py $(DATA)/cells $(DATA)/geneformer/V2 model=geneformer_10m --warmup 2 --seconds 60 \
	  --json benchmarks/results/scaling.json --chart benchmarks/results/scaling.png

bench-embed: setup
	$(BIN)/python benchmarks/embed.py $(DATA)/cells/pbmc4k_a.h5ad $(DATA)/geneformer/V1 --json benchmarks/results/embed.json

clean:
	rm -rf .venv .peers demo docs/_build .pytest_cache .mypy_cache .ruff_cache
