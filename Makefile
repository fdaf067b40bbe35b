# Needs only Python >= 3.11 with its venv module, pip, git and make. Every target sets up .venv itself, once.
#   make test ARGS="-k wire"          passes ARGS on to the tool
#   make setup PYTHON=/opt/python3.12  picks the Python
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY := .venv/bin/python
STAMP := .venv/.installed
ARGS ?=
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)

.PHONY: help setup demo test fuzz soak bench lint types format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv with the pinned versions (the other targets do it too)
	@:

demo: $(STAMP) ## train a LeNet on 4 local ranks twice, Adam and sign votes; a table, JSON and a picture
	@$(PY) -m launch.demo $(ARGS)

test: $(STAMP) ## run the tests and the doctests
	@$(PY) -m pytest $(ARGS)

fuzz: $(STAMP) ## a million payloads that nobody wrote, held to a slow oracle (ARGS="--seed 1"; about 20 minutes)
	@$(PY) -m tests.fuzz $(ARGS)

soak: $(STAMP) ## 1,000 faults in the lab, and the end state of runs without them (root for the links; about an hour)
	@$(PY) -m tests.soak $(ARGS)

bench: $(STAMP) ## measure codec, exchange, step and scaling beside their rivals (root for the lab, about 20 minutes)
	@for name in codec exchange step scaling cuda; do $(PY) -m benchmarks.$$name $(ARGS) || exit 1; done

lint: $(STAMP) ## ruff check and ruff format --check
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(STAMP) ## mypy --strict
	@$(PY) -m mypy $(ARGS)

format: $(STAMP) ## let ruff repair and format the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## remove .venv, caches and runs
	rm -rf .venv runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python that is new enough and can make an environment; a shim that exists but does not start is passed over.
$(STAMP): constraints.txt pyproject.toml
	@set -e; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  found=""; old=""; novenv=""; \
	  for candidate in $(CANDIDATES); do \
	    version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	    if ! "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then old="$$old $$candidate ($$version)"; continue; fi; \
	    if ! "$$candidate" -c 'import venv, ensurepip' 2>/dev/null; then novenv="$$candidate"; continue; fi; \
	    found="$$candidate"; break; \
	  done; \
	  if [ -z "$$found" ] && [ -n "$$novenv" ]; then \
	    echo "make: $$novenv has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv) and run make again" >&2; exit 1; fi; \
	  if [ -z "$$found" ]; then \
	    echo "make: Python >= 3.11 is needed, found$${old:- none} among $(CANDIDATES); install one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; fi; \
	  echo "make: setting up .venv with $$found"; \
	  "$$found" -m venv --clear .venv; \
	fi; \
	echo "make: installing the versions of constraints.txt; torch is large, the first time takes minutes"; \
	export PIP_DISABLE_PIP_VERSION_CHECK=1; \
	$(PY) -m pip install --quiet -c constraints.txt setuptools; \
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[launch,dev]'; \
	touch $(STAMP)
