# `make train` and `make test` work on a fresh machine with Python 3.11, make and git.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3 python,$(if $(shell command -v $(p) 2>/dev/null),$(p))))
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
# Size of the packages in GB; the default torch for Linux includes CUDA.
NEEDED_GB := 8
ARGS ?=

# Without bytecode files each process would compile torch and Lightning again: 8 s at every start.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install train test test-faults lint types format unit schedules reference bench bench-gpu gpu-check lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(STAMP) ## create .venv from requirements.lock

train: $(STAMP) ## draw characters that do not exist (under 5 minutes on 2 CPU cores); ARGS="experiment=digits" trains another recipe
	@$(RUN) -m src.train $(if $(filter experiment=% data=% resume=%,$(ARGS)),,experiment=kanji) $(ARGS)

test: $(STAMP) lint ## lint, check types and run all tests
	@$(MAKE) --no-print-directory -j 2 types unit

lint: $(STAMP) ## run ruff: style, imports, docstrings, formatting
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

types: $(STAMP) ## run mypy, strict on the mathematics, networks and data
	@$(VENV)/bin/mypy

unit: $(STAMP) ## run the tests; ARGS="-k posterior" selects some
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

test-faults: $(STAMP) ## run the fault tests (half an hour): kills, a full disk, dead processes, NaNs, every launcher
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m 'faults or slow'

format: $(STAMP) ## format the code
	@$(VENV)/bin/ruff check --fix-only . && $(VENV)/bin/ruff format .

schedules: $(STAMP) ## compare the noise schedules in a table and plots
	@$(RUN) -m src.schedules $(ARGS)

reference: $(STAMP) ## regenerate docs/reference.md from the comments in conf/
	@$(RUN) docs/reference.py

bench: $(PEERS) ## measure speed and quality against other projects on a CPU (hours); ARGS="--only unet_small"
	@$(RUN) -m benchmarks $(ARGS)

bench-gpu: $(PEERS) ## measure training steps, kernels and samples on a GPU
	@$(RUN) -m benchmarks --gpu $(ARGS)

gpu-check: $(STAMP) ## test precisions, memory and resuming on a GPU (8 minutes)
	@$(RUN) -m benchmarks.gpu_check $(ARGS)

lock: $(STAMP) ## resolve requirements.lock from pyproject.toml
	@$$(command -v uv || echo $(VENV)/bin/uv) pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-header --no-annotate --quiet -o requirements.lock

clean: ## remove the environment and caches (outputs/ stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

# A changed lock recreates the environment. pip installs uv if the machine does not have it.
$(STAMP): requirements.lock
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "error: no Python $(PYTHON) found: install Python 3.11 or newer, or set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: Python %d.%d is too old: install 3.11 or newer, or set PYTHON=/path/to/python3.11" % v[:2])'
	@$(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free / 1e9; sys.exit(free < $(NEEDED_GB) and "error: %.1f GB free, the environment needs $(NEEDED_GB) GB: free some space" % free)'
	@echo "Creating the environment in $(VENV) (once, a few minutes at most) ..."
	@rm -rf $(VENV)
	@if command -v uv >/dev/null 2>&1; then uv venv --quiet --python "$$(command -v $(PYTHON))" $(VENV); \
	else $(PYTHON) -m venv $(VENV) >/dev/null \
		|| { echo "error: python -m venv failed: install Python's venv module (Debian: apt install python3-venv), or uv"; exit 1; }; \
	fi
	@{ command -v uv >/dev/null 2>&1 || $(RUN) -m pip install --quiet --disable-pip-version-check uv; } \
		&& UV=$$(command -v uv || echo $(VENV)/bin/uv) && "$$UV" pip install --quiet --python $(RUN) -r requirements.lock \
		|| { echo "error: installing requirements.lock failed (see above): is the package registry reachable and the disk not full?"; exit 1; }
	@touch $@

$(PEERS): $(STAMP) pyproject.toml
	@UV=$$(command -v uv || echo $(VENV)/bin/uv) \
		&& "$$UV" pip install --quiet --python $(RUN) --group bench --constraint requirements.lock \
		|| { echo "error: installing the benchmark packages failed (see above): is the package registry reachable?"; exit 1; }
	@touch $@
