# make demo   sets up .venv and runs the main job
# make test   sets up .venv and passes the checks and tests
# make test-all   the slow tests and every pass on every small model as well (an hour)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all lint

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "enginewright needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch .venv/.ready

demo: setup
	$(BIN)/enginewright run dit-digits-int8 --output out/demo --force

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/tree && mkdir -p build/tree/enginewright
	ln -s $(CURDIR)/toolchain/* $(CURDIR)/passes $(CURDIR)/targets $(CURDIR)/validation $(CURDIR)/reports build/tree/enginewright/
	MYPYPATH=build/tree $(BIN)/mypy

test: lint demo
	$(BIN)/enginewright check out/demo --baseline reports/baselines/dit-digits.json --junit out/check.xml
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not gpu'
