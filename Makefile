# Two commands do it all: `make demo` shows the service at work, `make test` proves it.
# A GPU machine: see "GPU" in README.md before the first call.
VENV := .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin

.PHONY: demo serve test lint setup clean

demo: setup ## submit a picture and a video, watch them, show the files
	$(BIN)/wan-serve demo

serve: setup ## leave the service up until Ctrl-C
	@exec $(BIN)/wan-serve up

test: setup ## everything, on a real Ray cluster, a real store and a real FFmpeg
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.done

# torch comes first and by itself, so that no other package's open range decides which build is taken.
$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.*"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean: ## remove the environment and all data, jobs and files included
	rm -rf $(VENV) data out
