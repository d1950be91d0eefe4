# make demo    set up, build, and show networks before and after
# make test    set up, build, then lint, types and all tests
# VENV=folder  reuses an environment elsewhere

VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
INSTALLED = $(VENV)/dlkernels-requirements.txt
CPP = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h')

export PYTHONPATH := $(CURDIR)

.PHONY: demo test gpu bench setup build lint types format clean

demo: build
	$(PY) -m dlkernels demo

test: build lint types
	$(PY) -m pytest tests
	TRITON_INTERPRET=1 $(PY) -m pytest tests/gpu_proof

gpu: build
	$(PY) -m dlkernels info
	$(PY) -m pytest tests
	TRITON_INTERPRET=1 $(PY) -m pytest tests/gpu_proof
	$(PY) -m pytest benchmarks --benchmark-only

bench: build
	$(PY) -m pytest benchmarks --benchmark-only

setup:
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@cmp -s requirements.txt $(INSTALLED) || { \
	  $(PY) -m pip install --disable-pip-version-check -r requirements.txt && \
	  cp requirements.txt $(INSTALLED); }

build: setup
	$(PY) setup.py -q build_ext --inplace

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

types: setup
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

clean:
	rm -rf build dlkernels/*.so
