# make test      install what is missing into .venv and run all but the slowest tests (15 minutes on two cores, 4 more the first time)
# make demo      broker, coordinator and node on loopback train the shipped tiny model; writes build/demo/report.json
# make docs      the documentation as a site that needs no network: build/site/index.html
# make check     lint and types
# make test-all  all tests, the slow ones too, and what takes hours: training on plain PyTorch, a hundred plugs pulled (with MQTT
#                3.1.1 too), files that go by HTTPS meanwhile, full disks, forty nodes whose broker and coordinator are killed, what
#                repairs gain, adapters in llama.cpp, a million damaged messages, a thousand jobs through one node, services under a
#                systemd of their own, the wheel alone, images and the tutorial on a clean Debian, wheels for all Pythons and
#                processors, all tests on the oldest Python. It takes root, what .ci/run installs, Debian's openssh-client,
#                debootstrap, systemd-container, buildah, podman, crun and catatonit, and Python 3.11 or 3.13: where `make test`
#                leaves out what cannot be tried, this fails
# make test-oldest  all tests on Python 3.10, in an environment of its own; OLDEST=python3.10 is that Python
# TORCH=cuda takes PyTorch with CUDA from the package index instead of the CPU build.

PYTHON ?= python3
TORCH ?= cpu
OLDEST ?= python3.10
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

TRAINING_TESTS := $(addprefix tests/test_,$(addsuffix .py,train resume loop packing methods nlft reft evaluation build repair \
    interruptions loading nf4 cache fused trees rungs enforce generate dry_run supervised runner))

LONG_TESTS := $(addprefix tests/long_,$(addsuffix .py,killed interruptions https disks models fleet two_coordinators chaos mechanism \
    systemd wheel docs))

.PHONY: test test-torch-kernel test-oldest test-all check demo docs venv clean

venv: $(VENV)/.installed-$(TORCH)

$(VENV)/.installed-$(TORCH): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	$(PIP) 'torch==$(TORCH_VERSION)+cpu' 2>/dev/null || $(PIP) 'torch==$(TORCH_VERSION)+cpu' --index-url https://download.pytorch.org/whl/cpu
else
	$(PIP) --force-reinstall torch
endif
	$(PIP) --editable '.[dev]'
	rm -f $(VENV)/.installed-*
	touch $@

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Slow tests are for `make test-all`.
SELECT = -m 'not slow'

# A file of tests stays on one core: its tests share what is slow to make. Each trainer computes on one thread.
test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(SELECT)

# NF4 in plain PyTorch, as where bitsandbytes' kernels do not run.
test-torch-kernel: venv
	EDGE_AGENT_NF4_KERNEL=torch $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(TRAINING_TESTS)

# What a machine lacks fails these tests (tests/lacking.py), and is left out by others.
test-all: export EDGE_AGENT_TEST_ALL = 1
test-all: SELECT =
test-all: test test-torch-kernel
	$(BIN)/python -m pytest --timeout 3600 $(LONG_TESTS)
	$(BIN)/python -m pytest --timeout 7200 tests/long_tutorial.py tests/long_images.py
	EDGE_AGENT_TEST_PROTOCOL=3.1.1 $(BIN)/python -m pytest --timeout 3600 \
	    $(addprefix tests/,$(addsuffix .py,test_interruptions long_interruptions test_killed long_killed long_chaos))
	$(PIP) 'xllamacpp>=2026.10' && $(BIN)/python -m pytest --timeout 3600 tests/long_llama_cpp.py
	mkdir -p build && $(BIN)/python benchmarks/fuzz.py --messages 1000000 --out build/fuzz.json
	$(BIN)/python benchmarks/week.py --jobs 1000 --out build/week.json
	tests/second_python.sh
	$(BIN)/python -m pytest --timeout 3600 tests/long_resolution.py
	$(MAKE) test-oldest

# Jetson's Python. The environment is made as the other one is.
test-oldest:
	$(MAKE) test SELECT= VENV=build/python3.10 PYTHON=$(OLDEST)

demo: venv
	$(BIN)/edge-agent demo --out build/demo

docs: venv
	$(BIN)/python docs/generate.py build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) build dist
