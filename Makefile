# `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := optimizer passes quant backends evals tests benchmarks

.PHONY: help setup demo test fast lint typecheck slow bench bench-quality train clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

setup: .venv/.installed ## create .venv and install everything into it

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=strict --editable '.[dev]'
	@touch $@

demo: setup ## optimize the embedded model; leaves out/demo/ with the artifact and report.html
	$(BIN)/optimizer run reference --recipe default --out out/demo

test: setup lint typecheck ## lint, types and the whole test suite, a worker a core: what CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

fast: setup ## the tests of the pure layers alone: seconds
	$(BIN)/python -m pytest tests/quant tests/evals tests/test_layers.py tests/test_package.py -x -q

lint: setup ## ruff: rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

typecheck: setup ## mypy, strict
	@# A strict editable install links the files it found, and mypy follows those links: link new files first.
	@$(BIN)/python -m pip install --quiet --no-deps --config-settings editable_mode=strict --editable .
	$(BIN)/mypy

slow: setup ## tests that take minutes
	$(BIN)/python -m pytest -m slow

bench: setup ## measure decode against Hugging Face generate; writes benchmarks/results/
	$(BIN)/python -m benchmarks.decode

bench-quality: setup ## perplexity of every quantization scheme; writes docs/quality.md
	$(BIN)/python -m benchmarks.quality

train: setup ## train the reference model again (over an hour on two cores)
	$(BIN)/python evals/reference/train.py

clean: ## remove .venv and everything built
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
