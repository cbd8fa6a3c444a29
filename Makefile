# Everything from a bare checkout: Python 3.11+, make and a package index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint test-server test-matrix test-slow clean

demo: $(VENV)/.demo
	$(BIN)/rlm-plugins demo

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -m 'not slow and not server' --cov --cov-report=term --cov-report=xml:.coverage.xml

lint: $(VENV)/.test
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyright

test-server: $(VENV)/.test
	bash tools/test_server.sh $(BIN)/python

test-matrix:
	bash tools/test_matrix.sh $(PYTHON)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -m slow

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis .coverage .coverage.xml dist build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing rlm-plugins with LangChain and LlamaIndex (about a minute) ..."
	$(PIP) --editable ".[langchain,llama-index]"
	@touch $@

# torch first and by name: with it in place no other package has a reason to fetch an accelerator build.
$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing the test environment (a few minutes) ..."
	$(PIP) torch
	$(PIP) --editable ".[all,test]"
	@touch $@
