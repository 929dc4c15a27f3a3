# The two commands that do everything: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean

demo: $(VENV)/.eval
	$(BIN)/thrift demo

test: $(VENV)/.dev lint
	$(BIN)/pytest -n 2 tests/unit tests/integration tests/architecture
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/kernels

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.eval: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e '.[eval,plot]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.eval
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo dist
