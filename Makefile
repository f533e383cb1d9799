# Needs Python >= 3.11 and make; a C++ compiler only speeds up the CPU path. Everything else is
# installed into .venv, and again only when a file that decides what to install has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tiledcore
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: install lint check test test-all format demo demo-before pictures bench bench-gpu bench-modes train docs dist clean
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
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

install: $(STAMP)-install

lint: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# `pytest`, not `python -m pytest`: the latter puts the root, and so `kernels`, on sys.path.
# Two processes: a test keeps one core busy, and more would need more memory than small machines have.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

# One minute: the rooms of the core without the ops, whose kernels are interpreted, and without the two files whose
# tests start processes: each of those loads all packages again.
PROCESSES := tests/loop/test_capture_safety.py tests/loop/test_checkpoint.py
check: lint
	$(PYTEST) -m "not slow" $(addprefix --ignore ,$(PROCESSES)) tests/canvas tests/loop tests/schedulers tests/tiles \
		tests/test_geometry.py tests/test_utils.py $(PYTEST_ARGS)

# Five minutes: all but what is marked slow. This is the gate.
test: lint
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# Everything, with new and many examples of every property.
test-all: lint
	HYPOTHESIS_PROFILE=search $(PYTEST) $(PYTEST_ARGS)

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

demo: install
	@echo "demo.png: one map of 2048x2048 px, made at 256x256 and enlarged three times; about 40 s on two cores"
	$(BIN)/tiledcore generate "topographic map of a rugged coast" --size 2048x2048 --seed 3 --stages auto --steps 8 \
		--out demo.png
	$(BIN)/python -m bench.seams demo.png

# The same seed and steps by tiles that do not overlap and know nothing of each other.
demo-before: install
	$(BIN)/tiledcore generate "topographic map of a rugged coast" --size 2048x2048 --seed 3 --steps 8 \
		--motion still --overlap 0 --out demo-before.png
	-$(BIN)/python -m bench.seams demo-before.png

# The tables of docs/benchmarks.md that have markers. BENCH_ARGS=--quick for the small cases.
# All ways over one canvas and the other methods take over half an hour more: `make bench-modes`.
bench: install
	$(BIN)/python -m bench run --json bench/results/cpu_suite.json $(BENCH_ARGS)
	$(BIN)/python -m bench.oracle --json bench/results/oracle.json
	$(BIN)/python -m bench tables

# Everything that needs a GPU, in ten minutes and without a network: docs/gpu.md says how to read it.
bench-gpu: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench.gpu_suite bench/results/gpu

bench-modes: install
	$(BIN)/python -m bench.modes --model earth --size 1024 --seeds 2 --json bench/results/modes_earth_1024.json
	$(BIN)/python -m bench.modes --model earth-flux --size 1024 --seeds 2 --json bench/results/modes_flux_1024.json
	$(BIN)/python -m bench tables

# -P keeps the root, and so `kernels`, off sys.path.
train: install
	$(PIP) --no-build-isolation -e '.[dev,train]'
	$(BIN)/python -P -m tiledcore.models.training $(TRAIN_ARGS)

# The pictures of the README and the docs; Chromium makes those of the viewer.
pictures: demo demo-before
	$(BIN)/python -W ignore docs/pictures.py

# The pages as a site in build/site; a warning, such as a dead link, is an error.
docs: install
	test -x $(BIN)/mkdocs || $(PIP) --no-build-isolation -e '.[dev,docs]'
	$(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

# The wheel and the source archive, built without torch: one wheel for all, without the C++ extension.
dist: $(BIN)/python
	$(PIP) build
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f tiledcore/_C*.so demo.png demo-before.png
