# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make .venv and install into it.

PYTHON ?= python3
VENV := .venv
# The order of the tests is random, and the same each time; SEED=default draws another one.
SEED ?= 3016331011
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS := README.md $(wildcard docs/*.md docs/*/*.md)

.DEFAULT_GOAL := help
.PHONY: adapt help demo test test-all soak mutate lint format typecheck readme docs bench clean

help:
	@echo "make demo       the main job on a pretrained network: splice, prove, strip"
	@echo "make test       the tests, in under ten minutes on two cores"
	@echo "make test-all   with those that are marked as long; this is what CI runs"
	@echo "make soak       20,000 random networks against a plain interpreter; a quarter of an hour on two cores"
	@echo "make mutate     break the library in 127 small ways; the tests must notice each"
	@echo "make lint       ruff's checks and formatting (make format repairs)"
	@echo "make typecheck  mypy --strict"
	@echo "make readme     run the code blocks of README.md and docs/"
	@echo "make docs       build the site into site/, strictly"
	@echo "make bench      measure performance beside the peers (docs/performance.md)"
	@echo "make clean      delete .venv and everything else that was made here"

demo: $(INSTALLED)
	@$(BIN)/grl-surgery demo

# Two workers with one thread each: as fast as two cores allow, without the two getting in each other's way.
test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "not long" --randomly-seed=$(SEED) $(ARGS)

test-all: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q --randomly-seed=$(SEED) $(ARGS)

soak: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(ARGS)

mutate: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: $(INSTALLED)
	@$(BIN)/mypy

readme: $(INSTALLED)
	@$(BIN)/python docs/run_blocks.py $(DOCS)

docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# One peer pins another torchmetrics than the tests use, so it is kept beside the environment; the rest is in dev.
adapt: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/adaptation $(ARGS)

bench: $(INSTALLED) build/bench
	@OMP_NUM_THREADS=1 PYTHONPATH=build/bench $(BIN)/python benchmarks/performance $(ARGS)

build/bench:
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ \
	  pytorch-adapt==0.0.83 pytorch-metric-learning==1.6.3

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || { echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python's venv module is missing or broken (Debian and Ubuntu: apt install python3-venv)."; exit 1; }; }
	@echo "Installing grl-surgery, PyTorch and the tools for the tests into $(VENV); this takes a few minutes, once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
