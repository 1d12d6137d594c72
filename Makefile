# The checks of this project. `.ci/run` calls `make ci`; the workflow on GitHub calls the same targets.
# BIN is where the tools of the test environment lie; `make test` makes that environment.
BIN ?= .venv-test/bin
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.PHONY: help ci test readme lint types layers kernels docs format sizes constraints picture

step = @printf '\n== %s\n' "$(1)"
# the lines of the README's command $(1), between the fences of its code block
readme_command = awk '/^<!-- command: $(1) -->/ { on = 1; next } on && /^```/ { if (++fence == 2) exit; next } on' README.md

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

ci: test readme lint types layers ## what has to hold before a change lands

test: ## the README's test command: makes .venv-test and runs all tests
	$(call step,the README's test command)
	@command="$$($(call readme_command,tests))"; \
	[[ -n $$command ]] || { echo "README.md has no test command"; exit 1; }; \
	echo "\$$ $$command"; bash -euo pipefail -c "$$command"

readme: ## every command that README and docs name, on the real model
	$(call step,every command of the pages on the real model and what each promises)
	$(BIN)/python -m tests.readme_commands

lint: ## ruff: rules and format
	$(call step,style)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: ## mypy, strict
	$(call step,types)
	$(BIN)/mypy

layers: ## import-linter: which package may import which
	$(call step,layers)
	$(BIN)/lint-imports

kernels: ## the kernels' tests with g++, clang++ and for aarch64; exit code 77: a compiler or emulator is missing
	$(call step,kernels for each compiler and instruction set)
	tests/kernels/run

docs: ## write the generated blocks of the pages again
	$(BIN)/python -m tests.support.generated_docs

format: ## ruff: format, and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sizes: ## the largest classes and functions
	$(BIN)/python -m tests.support.sizes

constraints: ## write tests/constraints.txt again; versions that it has stay
	$(BIN)/python -m tests.support.constraints

picture: ## make the README's picture again, with the real model
	$(BIN)/python -m tests.support.picture
