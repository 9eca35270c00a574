# `make train` and `make test` set themselves up in $(VENV) from the pinned constraints. The other targets are for
# developers. ARGS adds words to a command: make train ARGS="--arch v1 max_steps=100"
# `make cuda-host` runs the CUDA path without a GPU: see tests/cuda_host/README.md.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Of `make gpu`.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
# Of `make cuda-host`: the CUDA build, and its environment, which is kept.
TORCH ?= 2.14.1
CUDA_VENV ?= .venv-cuda-$(basename $(TORCH))
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: train test test-fast cuda-host versions lint gpu bench soak fuzz audit

train: $(VENV)/.runtime
	$(VENV)/bin/python train.py $(ARGS)

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n auto --dist worksteal $(ARGS)

test-fast: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n auto --dist worksteal -m "not slow and not browser" $(ARGS)

cuda-host: $(CUDA_VENV)/.cuda-host
	$(CUDA_VENV)/bin/python -m tests.cuda_host $(ARGS)

# The tests under each version of PyTorch: ARGS="--environments DIR 2.11" names their folder and versions.
versions: $(VENV)/.dev
	$(VENV)/bin/python -m bench.versions $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# With the Python that is there: a machine with a GPU has its own build of torch. See bench/README.md.
gpu:
	$(GPU_PYTHON) -m bench.first_light $(ARGS)

bench: $(VENV)/.dev
	$(VENV)/bin/python -m pytest bench/ --benchmark-only $(ARGS)

soak: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.faults.soak $(ARGS)

fuzz: $(VENV)/.dev
	$(VENV)/bin/python -m tests.fuzz.campaign $(ARGS)

# In an environment of its own; --strict, or pins that the service does not know would pass as clean.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --disable-pip-version-check -q pip-audit
	$(VENV)-audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	touch $@

# The newest packages that go with $(TORCH): the pinned ones go with another version.
$(CUDA_VENV)/.cuda-host:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --disable-pip-version-check -q torch==$(TORCH) -e '.[profile]' pytest
	touch $@
