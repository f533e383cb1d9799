# Needs Python >= 3.11 and make; a C++ compiler only speeds up the CPU path. Everything else is
# installed into .venv, and again only when a file that decides what to install has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tiledcore
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: install test lint format demo bench train clean
.DEFAULT_GOAL := install

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tiledcore needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its pin: asked for through another package, pip may pick another build.
$(STAMP)-deps: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) setuptools wheel
	$(PIP) torch
	touch $@

# No build isolation: the extension is compiled against the torch that it will run with.
$(STAMP)-install: $(STAMP)-deps $(wildcard setup.py csrc/* csrc/*/*)
	$(PIP) --no-build-isolation -e '.[dev,bench]'
	touch $@

install: $(STAMP)-install

lint: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# `pytest`, not `python -m pytest`: the latter puts the root, and so `kernels`, on sys.path.
test: lint
	$(BIN)/pytest $(PYTEST_ARGS)

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

demo: install
	$(BIN)/tiledcore generate "relief map of a rugged coast" \
		--size 2048x2048 --seed 0 --overlap 8 --steps 10 --out demo.png
	$(BIN)/python -m bench.seams demo.png

bench: install
	$(BIN)/python -m bench.bench_gather_tiles $(BENCH_ARGS)
	$(BIN)/python -m bench.bench_blend_tiles $(BENCH_ARGS)
	$(BIN)/python -m bench.bench_neighbor_attention $(BENCH_ARGS)
	$(BIN)/python -m bench.bench_neighbor_attention --scaling
	$(BIN)/python -m bench.bench_fused_step $(BENCH_ARGS)
	$(BIN)/python -m bench.bench_group_norm_silu $(BENCH_ARGS)
	$(BIN)/python -m bench.bench_vae
	$(BIN)/python -m bench.seams --generate

# -P keeps the root, and so `kernels`, off sys.path.
train: install
	$(PIP) --no-build-isolation -e '.[dev,bench,train]'
	$(BIN)/python -P -m tiledcore.models.train $(TRAIN_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f tiledcore/_C*.so demo.png
