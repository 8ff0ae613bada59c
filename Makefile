# Everything runs from .venv, which is made once and made anew when the pins change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
WORKERS ?= 2
SIZE ?= 0.5

.PHONY: setup demo test test-gpu check bench schemes cluster crash clean
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/doit release:tiny-llama

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist=loadgroup

test-gpu: setup
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m pytest -m gpu tests/test_gpu.py -rs && $(BIN)/python tests/benchmarks/gpu.py; \
	else \
		echo 'test-gpu: skipped, for there is no GPU here that torch can use'; \
	fi

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m builder.manifest --check
	$(BIN)/python -m pytest tests/test_architecture.py

bench: setup
	$(BIN)/python tests/benchmarks/packing.py
	$(BIN)/python tests/benchmarks/build.py $(SIZE) $(BENCH)

schemes: setup
	$(BIN)/python tests/benchmarks/schemes.py README.md

cluster: setup
	$(BIN)/python tests/cluster.py

crash: setup
	$(BIN)/python tests/crash.py 50

clean:
	rm -rf build
