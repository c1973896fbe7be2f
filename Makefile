# `make test` installs and checks everything; nothing else is needed on a machine with Python 3.11 and a C library.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install test chaos format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# Long: 20,000 triggers under kill -9, full disks, lost cameras and 100,000 malformed messages.
chaos: install
	$(BIN)/python tests/chaos.py --triggers 20000 --fuzz 100000

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)
