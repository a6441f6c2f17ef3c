# Everything runs in .venv, which is made on the first call; needed beforehand: python3 with pip, and a C++ compiler for the
# fast CPU operators (without one they are left out). TORCH=2.11.0 takes another torch than constraints.txt pins; pip's own
# variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) say where from.
PYTHON ?= python3
TORCH ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIN := $(if $(TORCH),torch==$(TORCH),-c constraints.txt)
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: help demo test lint bench clean

help:
	@echo 'make demo   track a target in a real clip: annotated video, boxes and a contact sheet in demo_out/'
	@echo 'make test   the whole test suite'
	@echo 'make lint   ruff'
	@echo 'make bench  time the operators and a whole frame on this machine'
	@echo 'make clean  remove .venv and everything built'

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist demo_out *.egg-info dmv_fast/_build.json dmv_fast/_C.*
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV); }
	$(BIN)/python -m pip --version || $(PYTHON) -m pip --python $(BIN)/python install pip

# torch comes first, and no isolation: the extension is built with the headers of the torch that it will run on.
$(STAMP): $(SOURCES) | $(BIN)/python
	$(PIP) install $(PIN) torch 'setuptools>=77' ninja
	$(PIP) install $(PIN) --no-build-isolation -e '.[test,demo,train,eval]'
	$(BIN)/python -m dmv_fast.doctor
	touch $@
