# Everything runs from .venv, which is made once and made anew when the pins change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
SERVING := .venv-serving
SERVING_READY := $(SERVING)/.ready-$(shell sha256sum < constraints-serving.txt | cut -c1-16)
WORKERS ?= 2
SIZE ?= 0.5
ARCH ?= $(shell uname -m)

.PHONY: setup demo test serving-env test-serving test-gpu check bench schemes cluster crash machines clean
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist=loadgroup -m 'not serving'

# vLLM pins other versions of what the builder pins, so it lives by itself. Its build for CPUs asks for a torch that only its
# makers' index has, and has another name than its `vllm` command looks for: both are seen to here.
serving-env: $(SERVING_READY)

$(SERVING_READY): constraints-serving.txt
	rm -rf $(SERVING)
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools wheel
	$(SERVING)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-serving.txt
	folder=$$($(SERVING)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info \
		&& mkdir $$folder && touch $$folder/RECORD \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$folder/METADATA
	touch $@

test-serving: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serving -rs tests

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
	$(BIN)/python tests/benchmarks/arithmetic.py $(SIZE)
	$(BIN)/python tests/benchmarks/build.py $(SIZE) $(BENCH)

schemes: setup
	$(BIN)/python tests/benchmarks/schemes.py README.md

cluster: setup
	$(BIN)/python tests/cluster.py

# One processor made to be eighteen: ARCH=aarch64 for an emulated ARM processor, SHORT=--short for two minutes of it.
machines: setup
	$(BIN)/python tests/drills/machines.py --arch $(ARCH) $(SHORT)

crash: setup
	$(BIN)/python tests/crash.py 50

clean:
	rm -rf build
