# make run: the main job on the shipped examples.   make test: every check.   Both set themselves up first: `make run`
# with what a user needs (requirements.txt), `make test` and `make lint` with the tools for it (requirements-dev.txt).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: run test lint setup setup-dev clean

run: $(READY)
	$(BIN)/python localization_heads_finder.py $(ARGS)

test: $(READY_DEV)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

setup-dev: $(READY_DEV)

# Made anew only when the list of requirements changes; `touch` comes last, so a broken set-up is not taken for one.
$(READY): requirements.txt pyproject.toml | $(BIN)/python
	$(PIP) -r requirements.txt
	$(BIN)/python -m compileall -q localization_heads  # what pip does for packages that are not editable
	@touch $(READY)

$(READY_DEV): requirements-dev.txt requirements.txt pyproject.toml | $(BIN)/python
	$(PIP) -r requirements-dev.txt
	@touch $(READY) $(READY_DEV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("localization-heads needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
