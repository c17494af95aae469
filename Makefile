# make test      install what is missing into .venv and run the tests (at most 15 minutes on 2 cores)
# make demo      train the shipped tiny model on domains it has not seen; writes build/demo/report.json
# make check     lint and types
# make test-all  the tests and the second Python
# TORCH=cuda takes PyTorch with CUDA from the package index instead of the CPU build.

PYTHON ?= python3
TORCH ?= cpu
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: test test-all check demo venv clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	$(PIP) 'torch==$(TORCH_VERSION)+cpu' 2>/dev/null || $(PIP) 'torch==$(TORCH_VERSION)+cpu' --index-url https://download.pytorch.org/whl/cpu
else
	$(PIP) torch
endif
	$(PIP) --editable '.[dev]'
	touch $@

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

test-all: test
	tests/second_python.sh

demo: venv
	$(BIN)/edge-agent demo --out build/demo

clean:
	rm -rf $(VENV) build dist
