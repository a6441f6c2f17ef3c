# Everything runs in .venv, which is made on the first call; needed beforehand: python3 with pip, and a C++ compiler for the
# fast CPU operators (without one they are left out). TORCH=2.11.0 takes another torch than constraints.txt pins; pip's own
# variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) say where from.
PYTHON ?= python3
TORCH ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIN := $(if $(TORCH),torch==$(TORCH),-c constraints.txt)
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: help demo test lint bench gpu clean

help:
	@echo 'make demo   track a target in a real clip: annotated video, boxes and a contact sheet in demo_out/'
	@echo 'make test   the whole test suite'
	@echo 'make lint   ruff'
	@echo 'make bench  time everything on this processor, a quarter of an hour: benchmarks/results/'
	@echo 'make gpu    on a machine with an NVIDIA GPU, tests and timings there, 9 minutes: benchmarks/results/'
	@echo 'make clean  remove .venv and everything built'

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .

# FAISS is only a rival in a table: where it is not to be had, it is left out.
bench: $(STAMP)
	-$(PIP) install $(PIN) faiss-cpu
	$(BIN)/python benchmarks/cpu.py $(BENCH_ARGS)

# Without .venv and without network: PYTHON is one that has PyTorch with CUDA, and dmv_fast is built into it.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist demo_out *.egg-info dmv_fast/_build.json dmv_fast/_C.*
	find . -name __pycache__ -prune -exec rm -rf {} +

# Debian's python3 makes no venv with pip in it unless python3-venv is there; its own pip can put one in.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV); }
	$@ -m pip --version || $(PYTHON) -m pip install pip \
	    --target "$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# torch comes first, and no isolation: the extension is built with the headers of the torch that it will run on.
$(STAMP): $(SOURCES) | $(BIN)/python
	$(PIP) install $(PIN) torch 'setuptools>=77' ninja
	$(PIP) install $(PIN) --no-build-isolation -e '.[test,demo,train,eval]'
	$(BIN)/python -m dmv_fast.doctor
	touch $@
