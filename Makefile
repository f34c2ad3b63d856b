.PHONY: demo test test-all setup check docs clean
.DEFAULT_GOAL := help
PYTEST := .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

setup:  ## make .venv with everything pss uses
	@tools/setup.sh

demo: setup  ## convert, train and sweep rho on real handwritten digits, under a schedule and dense
	@.venv/bin/python -m tools.demo

test: setup  ## run the tests, without those marked as exhaustive
	@$(PYTEST) -m "not exhaustive"

test-all: setup  ## run all tests
	@$(PYTEST)

check: setup  ## lint, format check, types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

docs: setup  ## build the documentation as a site: site/index.html
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs --quiet build --clean && echo "site/index.html"

clean:  ## remove the environment and all runs
	rm -rf .venv runs site build dist *.egg-info
