# `make run` and `make test` do all their own set-up in .venv; PYTHON names another interpreter (3.10 or later).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: run test fuzz lint docs check clean

run: $(VENV)/.run
	$(BIN)/python examples/iterate.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# Broken files in new ways: each random test of tests/faults/ goes on for FUZZ_SECONDS.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.test
	SELFEVO_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -n auto -k "mutat or flip" tests/faults $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W -n -q docs docs/_build

check: lint docs test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[report]'
	touch $@

$(VENV)/.test: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[test]'
	touch $@ $(VENV)/.run

$(VENV)/.lint: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[test,lint]'
	touch $@ $(VENV)/.test $(VENV)/.run

$(VENV)/.docs: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) docs/_build
