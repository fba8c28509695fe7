# Everything a newcomer, a developer and CI need. Each target sets up what it uses; a second run skips the set-up.
#
#   make demo     improve a real 135M-parameter language model on a score without a gradient
#   make test     lint, format check, types, import contracts, tests
#   make test-all   the same with the tests that take longest (marked slow)
#   make test-vllm  the tests of the vLLM backend, with vLLM's CPU build in an environment of its own (.venv-vllm)
#   make test-extras  each extra in a clean environment: install, --help, a tiny run (half an hour; EXTRAS="rl jax" for some)
#   make lint     the same without the tests
#   make bench    every script in benchmarks/; results and one table per machine go to benchmarks/results/
#   make docs     the documentation's site in build/site; a broken link is an error
#   make notebook   run examples/eggroll.ipynb and keep its outputs (EGGROLL_NOTEBOOK_FAST=1: shorter, for a check)
#   make dist     wheel and source archive in dist/, tried in a clean environment
#   make docker-check   lint the Dockerfile, and run the steps of its CPU target in a clean folder
#   make setup    only the virtual environment, with the development tools
#   make clean    remove the virtual environment, caches and build products (runs/ stays)
#
# PYTHON=python3.12 picks the interpreter, VENV=/path another place for the environment, and all PIP_* variables and
# pip's own configuration are honoured. PYTEST_ARGS="-k select" narrows `make test`; DEMO_ARGS replaces the demo.

VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n 2
PYTEST_MARKS ?= not slow
DEMO_ARGS ?= tune smollm2-135m --task one_sentence
SOURCES := src tests benchmarks examples recipes

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-vllm test-extras lint bench docs notebook dist docker-check setup clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

setup: $(VENV)/.installed-dev

# One stamp per set of extras: `make demo` does without the development tools and jax.
$(VENV)/.installed-%: pyproject.toml constraints.txt scripts/setup
	@VENV="$(VENV)" PYTHON="$(PYTHON)" sh scripts/setup $*

demo: $(VENV)/.installed-llm
	@$(BIN)/python -m eggroll.cli.main $(DEMO_ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check --quiet $(wildcard $(SOURCES)) && echo "ruff check     ok"
	@$(BIN)/ruff format --quiet --check $(wildcard $(SOURCES)) && echo "ruff format    ok"
	@$(BIN)/mypy --no-error-summary && echo "mypy           ok"
	@$(BIN)/lint-imports > $(VENV)/lint-imports.log \
		&& echo "import layers  ok" || { cat $(VENV)/lint-imports.log; exit 1; }

# One thread a process: the tests are many small operations, and two processes share two cores.
test: lint
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -m "$(PYTEST_MARKS)" $(PYTEST_ARGS)

test-all:
	@$(MAKE) test PYTEST_MARKS="slow or not slow"

.venv-vllm/.installed-vllm: pyproject.toml constraints-vllm.txt scripts/setup
	@VENV=.venv-vllm PYTHON="$(PYTHON)" sh scripts/setup vllm

test-vllm: .venv-vllm/.installed-vllm
	@TOKENIZERS_PARALLELISM=false .venv-vllm/bin/python -m pytest -q -m "$(PYTEST_MARKS)" tests/test_vllm

# RESOLUTION=lowest-direct takes the oldest releases that pyproject.toml allows, tested those of constraints.txt.
test-extras: $(VENV)/.installed-dev
	@$(BIN)/python scripts/extras.py --uv $(BIN)/uv --resolution $(or $(RESOLUTION),highest) $(EXTRAS)

bench: $(VENV)/.installed-dev
	@for script in benchmarks/bench_*.py; do \
		case $$script in *_cuda.py) nvidia-smi -L > /dev/null 2>&1 || { echo "== $$script: no GPU here, left out"; continue; };; esac; \
		echo "== $$script"; $(BIN)/python $$script || exit 1; \
	done
	@$(BIN)/python benchmarks/summary.py && $(BIN)/python benchmarks/summary.py --moved

docs: $(VENV)/.installed-dev
	@$(BIN)/python scripts/site.py --zensical $(BIN)/zensical

notebook: $(VENV)/.installed-dev
	@$(BIN)/python scripts/notebook.py $(NOTEBOOK_ARGS)

dist: $(VENV)/.installed-dev
	@$(BIN)/python scripts/dist.py --uv $(BIN)/uv

docker-check: $(VENV)/.installed-dev
	@$(BIN)/hadolint Dockerfile && echo "hadolint       ok"
	@$(BIN)/python scripts/docker_steps.py

clean:
	rm -rf $(VENV) .venv-vllm build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks examples recipes -name __pycache__ -type d -prune -exec rm -rf {} +
