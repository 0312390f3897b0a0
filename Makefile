# Every target does its own set-up: a virtual environment in .venv and an ordinary install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
PEERS := $(VENV)/.peers
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install quickstart test test-slow faults check format clean

help:
	@echo "make quickstart  train and look at a small BEiT-3 on real pictures (ten minutes on two CPU cores)"
	@echo "make test        the test suite"
	@echo "make test-slow   the tests marked slow"
	@echo "make faults      all tests of kills, hangs and damaged files, the long ones too (half an hour on two cores)"
	@echo "make check       format, lint and strict types over library, recipes, tests, examples, benchmarks"
	@echo "make format      let ruff rewrite what 'make check' would complain about"

$(READY): pyproject.toml setup.py
	@echo "installing into $(VENV) (PyTorch and its companions take a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip setuptools
	@$(PIP) --editable '.[quickstart,dev]'
	@touch $@

# What tests compare with, or are skipped without. --no-deps: they need none of what they ask for.
$(PEERS): $(READY)
	@$(PIP) --no-deps pycocoevalcap==1.2 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth
	@touch $@

install: $(READY)

quickstart: $(READY)
	$(BIN)/beit3 quickstart --resume

# Two at a time: many tests wait for processes of their own. Files stay together, and with them what they prepare once.
test: $(PEERS)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" tests

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow tests --ignore tests/faults

faults: $(PEERS)
	$(BIN)/python -m pytest tests/faults

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
