# make setup | demo | test | lint | docs | bench | clean. `setup` and `demo` install what a user needs, the others also
# what a developer needs. Everything lives in .venv/ and runs/ of this folder.
PYTHON ?= python3
WORKERS ?= 2
# Torch comes first and alone. TORCH_INDEX names another package index, for example one that holds CPU-only builds.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
RUN ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev
BENCH_READY := $(VENV)/.ready-bench

export MPLBACKEND ?= Agg

.PHONY: setup demo test lint format docs bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "setup: virtual environment in $(VENV)/"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: $(TORCH) (the largest part; a few minutes on a slow line)"
	@$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "setup: everything else"
	@$(PIP) -c constraints.txt -e .
	@touch $@
	@echo "setup: done; $(BIN)/erft --help"

$(DEV_READY): $(READY)
	@echo "setup: what the tests need: tools, peers to compare with, environments that are not ours"
	@$(PIP) -c constraints.txt -e ".[dev,tasks]"
	@$(PIP) -c constraints.txt --no-deps gym-pusht openenv-core  # what they list contradicts minigrid's pins, and ours
	@touch $@

demo: setup
	@$(BIN)/erft train demo --run $(RUN)

test: export OMP_NUM_THREADS = 1
test: $(DEV_READY) $(if $(ARGS),,lint)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --timeout 600 $(ARGS)

lint: $(DEV_READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted as agreed: make format" >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/python docs/generate.py --check

format: $(DEV_READY)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

docs: $(DEV_READY)
	@$(BIN)/python docs/generate.py

$(BENCH_READY): $(DEV_READY)
	@$(PIP) -c constraints.txt -e ".[dev,tasks,bench]"
	@touch $@

bench: $(BENCH_READY)
	@for file in $$(grep -l '__main__' benchmarks/*.py); do \
	  name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS) || exit 1; done

clean:
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis htmlcov .coverage*
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
