# Python 3.11, pip and make are all you need: each target sets up .venv first.
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    ?= .venv
VARIANT ?= v3
DATA    ?= auto
ARGS    ?=
PORT    := 5000

# A misspelled variable would be ignored in silence, so refuse those that nothing here reads.
typed   := $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
unknown := $(firstword $(filter-out PYTHON VENV VARIANT DATA ARGS PORT,$(filter-out -%,$(typed))))
ifneq (,$(unknown))
option := $(shell printf %s '$(unknown)' | tr A-Z_ a-z-)
$(error make does not know $(unknown). It knows VARIANT, DATA, ARGS, PORT, PYTHON and VENV. Give \
options of the job like this: make run ARGS="-P $(option)=$($(unknown))")
endif

# Options of `mlflow run`; those of the job follow a -P.
MLFLOW_OPTIONS := entry-point version param-list docker-args experiment-name experiment-id backend \
	backend-config env-manager storage-dir run-id run-name build-image help
ifneq (,$(filter run,$(MAKECMDGOALS)))
known := $(addprefix --,$(MLFLOW_OPTIONS) $(addsuffix =%,$(MLFLOW_OPTIONS)))
wrong := $(firstword $(filter-out $(known),$(filter --%,$(ARGS))))
ifneq (,$(wrong))
name := $(firstword $(subst =, ,$(wrong:--%=%)))
$(error ARGS goes to `mlflow run`, which does not know $(wrong). Give options of the job like this: \
make run ARGS="$(subst --$(name)=,-P $(name)=,$(subst --$(name) ,-P $(name)=,$(ARGS)))")
endif
endif

comma   := ,
# On a machine with an NVIDIA driver TensorFlow needs its CUDA libraries too.
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(comma)cuda)
READY  := $(VENV)/.ready
# A file's tests share servers: one process runs them. tests/conftest.py puts the longest files first.
IN_TWO_PROCESSES := --numprocesses 2 --dist loadfile --no-loadscope-reorder
RUN    := PATH="$(abspath $(VENV))/bin:$$PATH"

.PHONY: help setup run ui test test-slow soak check audit format clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## Set up the virtual environment .venv (the other targets do it when needed)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) and sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11")'
	@echo "Setting up $(VENV): about two minutes and $(if $(findstring cuda,$(EXTRAS)),several,1) GB of downloads, only this once."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $(READY)

run: $(READY)  ## Run the main job: make run [VARIANT=v5] [DATA=/path] [ARGS="-P epochs=5"]
	$(RUN) mlflow run . --env-manager local --experiment-name har -P variant=$(VARIANT) -P data='$(DATA)' $(ARGS)

ui: $(READY)  ## Show the recorded runs at http://127.0.0.1:5000: make ui [PORT=5055]
	@$(VENV)/bin/python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT)))' 2>/dev/null \
		|| { echo "error: cannot use port $(PORT); give a free one: make ui PORT=5055" >&2; exit 1; }
	$(RUN) har ui --offline --port $(PORT)

test: $(READY)  ## Run the tests: about six minutes on two cores, in two processes
	$(RUN) python -m pytest $(IN_TWO_PROCESSES)

test-slow: $(READY)  ## Run the long tests too
	$(RUN) python -m pytest -m '' $(IN_TWO_PROCESSES)

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

clean:  ## Remove .venv and the caches of tools; recorded runs stay
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache
