# Two commands: `make run` installs everything and runs the simulated line, `make test` installs everything and tests it.
# They want Python 3.11 or newer with its venv module, and the two libraries that OpenCV's wheel leaves to the system:
# on a bare Debian or Ubuntu, `apt-get install python3-venv libgl1 libglib2.0-0`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 10
WHEELHOUSE ?= wheelhouse
EXTRAS ?=
CHECK_LIBRARIES = @$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	echo "OpenCV cannot be loaded; it wants two of the system's libraries: apt-get install libgl1 libglib2.0-0" >&2; exit 1; }

.PHONY: run test quick install install-dev format chaos soak wheelhouse clean

run: install
	$(BIN)/flawline run

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	$(CHECK_LIBRARIES)
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(CHECK_LIBRARIES)
	touch $@ $(VENV)/.installed

test: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# While working: the tests that take seconds, without those marked `slow`.
quick: install-dev
	$(BIN)/python -m pytest -m "not slow"

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# 20,000 triggers under kill -9, full disks, lost cameras and 100,000 malformed messages.
chaos: install-dev
	$(BIN)/python tests/chaos.py --triggers 20000 --fuzz 100000

# Memory, handles and threads of a running agent at start and end: `make soak MINUTES=60`.
soak: install
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

# All that a machine without a network needs, for the same Python and processor as this one: `make wheelhouse`, carry the
# folder over, then `sh wheelhouse/install.sh`. EXTRAS=[gentl] adds a camera library.
wheelhouse: install
	rm -rf $(WHEELHOUSE) && mkdir -p $(WHEELHOUSE)
	$(BIN)/python -m pip wheel --quiet --wheel-dir $(WHEELHOUSE) '.$(EXTRAS)'
	echo 'flawline$(EXTRAS)' > $(WHEELHOUSE)/requirements.txt
	cp systemd/install.sh $(WHEELHOUSE)/
	cd $(WHEELHOUSE) && sha256sum *.whl requirements.txt install.sh > SHA256SUMS

clean:
	rm -rf $(VENV) $(WHEELHOUSE)
