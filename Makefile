# Everything starts here: `make train` and `make test` work on a fresh machine with Python 3.11, make and git.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3 python,$(if $(shell command -v $(p) 2>/dev/null),$(p))))
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
# Space that the packages take, in GB: the default torch for Linux brings CUDA along.
NEEDED_GB := 8
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install train test test-faults lint types format unit schedules bench bench-gpu gpu-check lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(STAMP) ## make the environment in .venv, from requirements.lock

train: $(STAMP) ## train on the embedded digits (2 to 6 minutes on 2 cores); ARGS="schedule=linear" for more
	@$(RUN) -m src.train $(ARGS)

test: $(STAMP) lint types unit ## lint, check types, run all tests

lint: $(STAMP) ## ruff: style, imports, docstrings, formatting
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

types: $(STAMP) ## mypy, strict on the mathematics, networks and data
	@$(VENV)/bin/mypy

unit: $(STAMP) ## the tests; ARGS="-k posterior" for some of them
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

test-faults: $(STAMP) ## what may befall a run, for half an hour: twenty kills, a full disk, dead processes, NaNs, every launcher
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m 'faults or slow'

format: $(STAMP) ## rewrite the code in the project's style
	@$(VENV)/bin/ruff check --fix-only . && $(VENV)/bin/ruff format .

schedules: $(STAMP) ## compare the noise schedules: a table and plots
	@$(RUN) -m src.schedules $(ARGS)

bench: $(PEERS) ## speed and quality for time against other projects, on a CPU, in several hours; ARGS="--only unet_small"
	@$(RUN) -m benchmarks $(ARGS)

bench-gpu: $(PEERS) ## training steps against other projects, kernels and samples, on a GPU
	@$(RUN) -m benchmarks --gpu $(ARGS)

gpu-check: $(STAMP) ## what CI cannot run, on a GPU, in under 8 minutes: a table of precisions, memory, resuming
	@$(RUN) -m benchmarks.gpu_check $(ARGS)

lock: $(STAMP) ## resolve requirements.lock anew from pyproject.toml
	@$$(command -v uv || echo $(VENV)/bin/uv) pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-header --no-annotate --quiet -o requirements.lock

clean: ## remove the environment and caches (outputs/ stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

# The environment is made again whenever the lock changes. uv is used if it is there, and else brought by pip.
$(STAMP): requirements.lock
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "error: no Python $(PYTHON) found: install Python 3.11 or newer, or give PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: Python %d.%d is too old: install 3.11 or newer, or give PYTHON=/path/to/python3.11" % v[:2])'
	@$(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free / 1e9; sys.exit(free < $(NEEDED_GB) and "error: %.1f GB free here, the environment needs $(NEEDED_GB) GB: make room" % free)'
	@echo "Making the environment in $(VENV) (once; a few minutes at most) ..."
	@rm -rf $(VENV)
	@if command -v uv >/dev/null 2>&1; then uv venv --quiet --python "$$(command -v $(PYTHON))" $(VENV); \
	else $(PYTHON) -m venv $(VENV) >/dev/null \
		|| { echo "error: python -m venv failed: install Python's venv module (Debian: apt install python3-venv), or uv"; exit 1; }; \
	fi
	@{ command -v uv >/dev/null 2>&1 || $(RUN) -m pip install --quiet --disable-pip-version-check uv; } \
		&& UV=$$(command -v uv || echo $(VENV)/bin/uv) && "$$UV" pip install --quiet --python $(RUN) -r requirements.lock \
		|| { echo "error: installing requirements.lock failed (see above): is the package registry reachable, the disk full?"; exit 1; }
	@touch $@

$(PEERS): $(STAMP) pyproject.toml
	@UV=$$(command -v uv || echo $(VENV)/bin/uv) \
		&& "$$UV" pip install --quiet --python $(RUN) --group bench --constraint requirements.lock \
		|| { echo "error: installing what is compared with failed (see above): is the package registry reachable?"; exit 1; }
	@touch $@
