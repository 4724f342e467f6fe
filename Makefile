# make run     a demo store, trained if there is none, and the server on http://127.0.0.1:8000
# make ranker  an example ranking service that calls it, on http://127.0.0.1:8100
# make unit    the unit tests, without those that take seconds each
# make test    every test
# make check   formatting, lint, types, import rules
# make bench   the benchmarks; benchmarks/README.md says what each answers
# make gpu     every test and benchmark that needs an NVIDIA card
# make setup   .venv with exact versions; the others call it
#
# PYTHON=python3.12 picks another interpreter. PIP_ARGS is passed to pip: on Linux without a GPU,
# PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' saves gigabytes of CUDA libraries.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install $(PIP_ARGS) --constraint constraints.txt

.PHONY: setup run ranker unit test check bench gpu format

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt clients/python/pyproject.toml clients/examples/ranker/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "embstore needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0])'
	@echo "setup: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing torch"
	@$(PIP) torch
	@echo "setup: installing embstore and everything else"
	@$(PIP) --editable '.[dev]' --editable clients/python --editable clients/examples/ranker
	@echo "setup: compiling kernels"
	@$(BIN)/python -m embstore.kernels.warm
	@touch $@

run: setup
	@$(BIN)/embstore demo --folder demo --no-serve
	@$(BIN)/embstore serve --store demo/store --redis embedded

ranker: setup
	@test -f demo/demo.toml || { echo "ranker: there are no demo tables yet; run make run first" >&2; exit 1; }
	@test -f demo/ranker/ranker.json || $(BIN)/python -m ranker train demo/demo.toml --store demo/store --artifact demo/ranker
	@$(BIN)/python -m ranker serve --artifact demo/ranker

unit: setup
	$(BIN)/python -m pytest tests/unit -m "not slow" --numprocesses 2 --dist worksteal -q

test: setup
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/embstore bench kernels
	$(BIN)/embstore bench train configs/globo.toml
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.client_overhead
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.batching
	$(BIN)/python -m benchmarks.shared_memory

gpu: setup
	$(BIN)/python -m benchmarks.gpu
