# Attention Atlas: every command a developer or a newcomer needs. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
APPS := $(patsubst apps/%/pyproject.toml,%,$(wildcard apps/*/pyproject.toml))
PACKAGES := packages/core_attn shared $(addprefix apps/,$(APPS))
ARGS ?=

# Two OpenMP threads that spin wait for each other made one suite fifty times slower; see docs/dependencies.md.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
# Relative on purpose: pip splits this variable at spaces, and a checkout's path may hold some.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Real data, when it lies beside the project; otherwise what ATTN_DATA names.
ifeq ($(origin ATTN_DATA),undefined)
ifneq ($(wildcard ../shared/data/README.md),)
export ATTN_DATA := $(shell cd ../shared/data && pwd)
endif
endif

.PHONY: help setup demo test test-slow test-gpu test-mmseg lint types bench bench-gpu clean $(foreach c,train eval compare,$(addprefix $(c)-,$(APPS)))

help:  ## this list
	@echo "Attention Atlas"
	@grep -hE '^[a-z-]+:.*##' "$(firstword $(MAKEFILE_LIST))" | sed -E 's/:.*## /\t/' | sort | expand -t 22
	@for c in train eval compare; do for a in $(APPS); do printf '%-21s %s\n' "$$c-$$a" "$$a $$c \$$(ARGS)"; done; done

# The stamp depends on what decides the environment, so a second `make` never reinstalls. It also holds the
# checkout's own path: editable installs and scripts in the environment name it, so a moved checkout sets up anew.
STAMP := $(VENV)/.installed
STAMP_KEY = $(CURDIR) $(shell cat constraints.txt requirements-dev.txt $(addsuffix /pyproject.toml,$(PACKAGES)) | cksum)

setup:  ## create .venv with everything, under constraints.txt (does nothing when it is up to date)
	@if [ "$$(cat "$(STAMP)" 2>/dev/null)" != "$(STAMP_KEY)" ]; then \
	  echo "Setting up $(VENV) (about two minutes, once)"; \
	  rm -f "$(STAMP)"; \
	  [ "$$(cat "$(VENV)/.path" 2>/dev/null)" = "$(CURDIR)" ] || rm -rf "$(VENV)"; \
	  [ -x "$(BIN)/python" ] || $(PYTHON) -m venv "$(VENV)"; \
	  echo "$(CURDIR)" > "$(VENV)/.path"; \
	  "$(BIN)/python" -m pip install --quiet -r requirements-dev.txt; \
	  "$(BIN)/python" -m pip install --quiet --no-deps --no-build-isolation natten; \
	  "$(BIN)/python" -m pip install --quiet --no-deps pesq >/dev/null 2>&1 || echo "pesq was left out: it needs a C compiler"; \
	  "$(BIN)/python" -m pip install --quiet --no-deps --no-build-isolation $(addprefix -e ./,$(PACKAGES)); \
	  echo "$(STAMP_KEY)" > "$(STAMP)"; \
	fi

demo: setup  ## a real forecast, scored against baselines, with a report (a few minutes, installation included)
	@"$(BIN)/python" -m attn_timeseries demo

test: setup  ## every test but the slow ones and those for a GPU (2 cores, under 15 minutes)
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

test-slow: setup  ## the long runs: quality on real data under ATTN_DATA
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -m slow $(ARGS)

# mmsegmentation has an environment of its own: its maintained fork bears the original's import names, and nothing else
# here needs it. Without MMCV_WITH_OPS=0 mmcv compiles its kernels, none of which the bridge uses.
MMSEG_VENV ?= .venv-mmseg
MMSEG_BIN := $(MMSEG_VENV)/bin
MMSEG_PACKAGES := packages/core_attn shared apps/medseg
MMSEG_KEY = $(CURDIR) $(shell cat constraints.txt $(addsuffix /pyproject.toml,$(MMSEG_PACKAGES)) | cksum)

test-mmseg:  ## the bridge to mmsegmentation, in an environment of its own that is made anew when pins change
	@if [ "$$(cat "$(MMSEG_VENV)/.installed" 2>/dev/null)" != "$(MMSEG_KEY)" ]; then \
	  echo "Setting up $(MMSEG_VENV) (about two minutes, once)"; \
	  rm -rf "$(MMSEG_VENV)" && $(PYTHON) -m venv "$(MMSEG_VENV)"; \
	  MMCV_WITH_OPS=0 "$(MMSEG_BIN)/python" -m pip install --quiet pytest pytest-timeout \
	    -e ./packages/core_attn -e ./shared -e "./apps/medseg[mmseg]"; \
	  echo "$(MMSEG_KEY)" > "$(MMSEG_VENV)/.installed"; \
	fi
	@OMP_NUM_THREADS=1 "$(MMSEG_BIN)/python" -m pytest tests/mmseg $(ARGS)

# On a machine with a GPU: our environment where its torch sees the card, else the machine's own Python, which needs
# torch, triton and pytest and nothing of ours installed.
define gpu_python
python=""; for p in "$(BIN)/python" "$(PYTHON)"; do \
  if "$$p" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then python="$$p"; break; fi; done; \
[ -n "$$python" ] || { echo "no Python with a torch that sees a CUDA device; name one: make $@ PYTHON=..." >&2; exit 1; }; \
export PYTHONPATH="$(CURDIR)/packages/core_attn/src$${PYTHONPATH:+:$$PYTHONPATH}"
endef

test-gpu:  ## the kernels' tests on this machine's card, and whatever else needs one
	@$(gpu_python); "$$python" -m pytest -m gpu $$(grep -lrE --include='test_*.py' --include='values_*.py' 'mark\.gpu\b' tests) $(ARGS)

bench-gpu:  ## speed of the kernels on this machine's card, into docs/benchmarks/gpu.md
	@$(gpu_python); "$$python" benchmarks/gpu.py $(ARGS)

lint: setup  ## ruff (style, imports, bugs) and its formatter in check mode
	@"$(BIN)/python" -m ruff check . && "$(BIN)/python" -m ruff format --check .
	@"$(BIN)/python" -m ruff check --quiet --preview --select PLW1514 .  # text is UTF-8 whatever the locale

types: setup  ## mypy over the packages
	@"$(BIN)/python" -m mypy

bench: setup  ## speed and memory of the mechanisms on this machine
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m core_attn bench $(ARGS)

define app_targets
train-$(1): setup
	@"$$(BIN)/python" -m attn_$(1) train $$(ARGS)
eval-$(1): setup
	@"$$(BIN)/python" -m attn_$(1) eval $$(ARGS)
compare-$(1): setup
	@"$$(BIN)/python" -m attn_$(1) compare $$(ARGS)
endef
$(foreach a,$(APPS),$(eval $(call app_targets,$(a))))

clean:  ## remove the environment, caches and runs
	@rm -rf "$(VENV)" "$(MMSEG_VENV)" .pytest_cache .ruff_cache .mypy_cache runs
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
