# The commands of this project. Everything runs in .venv, which the first of them creates.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart lint unit test test-long soak docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python -m nemo_ray.train configs/quickstart.yaml overwrite=true

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

unit: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not e2e and not long and not gpu and not soak"

test: lint unit
	$(BIN)/python -m pytest -m "e2e and not long and not gpu and not soak"

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "long and not gpu and not soak"

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -s -m soak

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) outputs site
