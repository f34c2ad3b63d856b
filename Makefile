.PHONY: demo test setup check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'

setup:  ## make .venv with everything pss uses
	@tools/setup.sh

demo: setup  ## convert, train and sweep rho on real handwritten digits, PSS against dense
	@.venv/bin/python -m tools.demo

test: setup  ## run the tests
	@.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

check: setup  ## lint, format check, types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

clean:  ## remove the environment and all runs
	rm -rf .venv runs build dist *.egg-info
