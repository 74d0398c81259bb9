# Two commands: `make demo` and `make test`. Each makes .venv first, if need be.
#
#   make demo WORKDIR=runs/mine      another place for the demo's run
#   make test ARGS='-k routing -x'   arguments for pytest
#   make env EXTRAS=dev,gpu          other extras of pyproject.toml
#   make env PYTHON=/path/to/python  another Python, 3.12 or later

.DEFAULT_GOAL := help
.PHONY: help demo test lint types notebooks tiny env clean

WORKDIR ?= runs/tiny
ARGS ?=
EXTRAS ?=
export EXTRAS PYTHON WORKDIR
python := .venv/bin/python
# Linux: large pages for buffers that come and go each step; on two CPU cores page
# faults cost a fifth of the time otherwise. Unknown elsewhere, and ignored.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

help:
	@echo 'make demo       train the tiny DeepSeek-V3 on two CPU cores, complete prompts'
	@echo 'make test       the test suite'
	@echo 'make lint       formatting and lint (ruff)'
	@echo 'make types      types (pyright)'
	@echo 'make notebooks  execute the notebooks'
	@echo 'make tiny       run the tiny variant of every config'
	@echo 'make env        only make .venv and install into it'
	@echo 'make clean      remove .venv and caches; runs/ stays'

demo: env
	@sh .ci/demo.sh

# A file's tests stay together: they share compiled programs and finished runs.
test: env
	@$(python) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: env
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .

types: env
	@$(python) -m pyright

notebooks: env
	@$(python) .ci/run_notebooks.py notebooks

tiny: env
	@sh .ci/run_tiny.sh

env:
	@sh .ci/make_env.sh

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
