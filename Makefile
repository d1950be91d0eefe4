# make demo    set up, build, and show networks before and after
# make test    set up, build, then lint, types and all tests
# make gpu     on a machine with a GPU: all tests and benchmarks, and a report of them
# make report  benchmarks, GPU traffic, and a page of both in out/report.html
# make wheel VARIANT=cpu|cu126|cu128|cu130    a wheel in dist/; make wheels: all possible here
# make fuzz    10,000 random calls of all ops; CASES=number for more or fewer
# make sanitize    the tests of all ops on CPU kernels with Address- and UndefinedBehaviorSanitizer
# VENV=folder  reuses an environment elsewhere

VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
INSTALLED = $(VENV)/dlkernels-requirements.txt
CPP = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp')

export PYTHONPATH := $(CURDIR)

VARIANT ?= cpu
TORCH ?= 2.13.0
CASES ?= 10000

.PHONY: demo test fuzz sanitize gpu bench traffic report wheel wheels sdist test-torch setup build lint types format clean

demo: build
	$(PY) -m dlkernels demo

# Two processes at once, whose threads do not spin while they wait for each other.
test: export OMP_WAIT_POLICY = passive
test: build lint types
	$(PY) -m pytest -n 2 --dist loadfile tests
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist loadfile tests/gpu_proof

fuzz: build
	DLKERNELS_FUZZ=$(CASES) $(PY) -m pytest tests/robustness/test_fuzz.py

sanitize: setup
	$(PY) tools/sanitize.py

gpu: build
	$(PY) tools/gpu_report.py

bench: build
	$(PY) -m dlkernels bench

# Bytes that GPU kernels move, counted on the CPU, for the report.
traffic: export DLKERNELS_TRAFFIC = $(CURDIR)/out/gpu-traffic.jsonl
traffic: build
	mkdir -p out && rm -f $(DLKERNELS_TRAFFIC)
	$(PY) -m pytest tests/gpu_proof/cuda_on_cpu -q -k traffic
	TRITON_INTERPRET=1 $(PY) -m pytest tests/gpu_proof/interpreted -q -k traffic --ignore tests/gpu_proof/interpreted/test_traffic.py

report: bench traffic
	$(PY) -m dlkernels report

wheel: setup
	$(PY) tools/build_wheel.py $(VARIANT)

wheels: setup
	$(PY) tools/build_wheel.py all

test-torch: setup
	$(PY) tools/test_other_torch.py $(TORCH)

sdist: setup
	$(PY) setup.py -q sdist

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
	rm -rf build dist dlkernels/*.so
