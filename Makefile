# Two commands: `make run` installs everything and runs the simulated line, `make test` installs everything and tests it.
# Nothing else is needed on a machine with Python 3.11 or newer, its venv module and a C library.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test install install-dev format chaos clean

run: install
	$(BIN)/flawline run

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

test: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# 20,000 triggers under kill -9, full disks, lost cameras and 100,000 malformed messages.
chaos: install-dev
	$(BIN)/python tests/chaos.py --triggers 20000 --fuzz 100000

clean:
	rm -rf $(VENV)
