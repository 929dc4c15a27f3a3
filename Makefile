# The two commands that do everything: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
GLUON := $(VENV)/gluon

.PHONY: demo test test-gpu lint install clean

demo: $(VENV)/.eval
	$(BIN)/thrift demo --mirror pypi

test: $(VENV)/.dev $(VENV)/.gluon lint
	$(BIN)/pytest -n 2 tests/architecture tests/reference tests/cache tests/transformers tests/lab
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/prefill tests/decode
	TRITON_INTERPRET=1 PYTHONPATH=$(GLUON) $(BIN)/pytest -n 2 tests/prefill/test_sm90_fp8_compile.py

# Kernel tests compiled, on the GPU of this machine, those marked gpu included.
test-gpu: $(VENV)/.dev
	$(BIN)/pytest -m 'gpu or not gpu' tests/prefill tests/decode tests/cache tests/reference

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

# The Triton whose Gluon the FP8 kernel of sm_90 is written in, beside the one that pip resolves to.
$(VENV)/.gluon: | $(BIN)/python
	$(BIN)/python -m pip install -q --no-deps --target $(GLUON) triton==3.6.0
	@touch $@

clean:
	rm -rf $(VENV) demo dist
