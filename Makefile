# Everything starts from Python 3.11, pip and make: each target sets up .venv by itself.
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    ?= .venv
VARIANT ?= v3
DATA    ?= auto
ARGS    ?=

comma   := ,
# On a machine with an NVIDIA driver TensorFlow needs its CUDA libraries too.
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(comma)cuda)
READY  := $(VENV)/.ready
RUN    := PATH="$(abspath $(VENV))/bin:$$PATH"

.PHONY: help setup run ui test test-slow soak check audit format clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## Make the virtual environment .venv (the other targets do it when needed)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) and sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $(READY)

run: $(READY)  ## Run the main job: make run [VARIANT=v2] [DATA=/path] [ARGS="-P epochs=5"]
	$(RUN) mlflow run . --env-manager local --experiment-name har -P variant=$(VARIANT) -P data='$(DATA)' $(ARGS)

ui: $(READY)  ## Show the recorded runs at http://127.0.0.1:5000
	$(RUN) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri sqlite:///mlflow.db --workers 1

test: $(READY)  ## Run the tests: twelve minutes on two cores, in two processes
	$(RUN) python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(READY)  ## Run the long tests too
	$(RUN) python -m pytest -m ''

soak: $(READY)  ## Kill trainings and servers, spoil files and requests; count what is lost
	$(RUN) python benchmarks/faults.py

check: $(READY)  ## Lint, formatting, types, and which package may import which
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) lint-imports --no-cache

audit: $(READY)  ## Look the installed packages up among known vulnerabilities
	$(RUN) uv tool run pip-audit --skip-editable --path "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

format: $(READY)  ## Rewrite the code in the project's format
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:  ## Remove .venv and what tools cached; recorded runs stay
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache
