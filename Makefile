# `make demo` and `make test` set up everything themselves; a second run installs nothing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
TEST_WORKERS ?= 2

.PHONY: setup demo test check bench test-slow clean

setup: .venv/installed

# torch is named in the same command as everything else: otherwise pip may bring a build with several GB of CUDA.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/glassgpt demo

# One thread a worker: two workers with two threads each would fight over two cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/glassgpt bench generate

clean:
	rm -rf .venv demo build dist *.egg-info
