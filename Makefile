# Thin over pip, maturin, cargo and pytest. The environment lies outside the checkout, holds exactly the packages of
# locks/, and is keyed by them, so that a changed lock makes a new one.

PYTHON ?= python3
QUARK_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/quark
# TORCH=cpu takes the build of torch without CUDA, from the index that uv knows for it.
TORCH ?= cuda
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
KEY := $(shell cat pyproject.toml locks/*.txt | cksum | cut -d' ' -f1)-$(PYTHON_VERSION)-$(TORCH)
VENV := $(QUARK_CACHE)/venv-$(KEY)
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --require-hashes --no-deps
RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
export VIRTUAL_ENV = $(VENV)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1

.PHONY: help demo test lint test-rust test-python test-newest test-oldest bench goals lock docs env clean

help:  ## What there is
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: env  ## Train the embedded model on the embedded reward, offline, in about a minute
	@$(BIN)/quark train demo --run-dir $(RUN_DIR)
	@echo; echo "The trade-off of reward and drift, by strength of guidance:"
	@$(BIN)/quark frontier $(RUN_DIR) --guidance 0,0.25,0.5,1
	@$(BIN)/quark report $(RUN_DIR)
	@echo; echo "The command quark lies in $(BIN); to have it at hand: source $(BIN)/activate"

test:  ## Everything that has to pass
	@$(MAKE) --no-print-directory --jobs lint test-rust
	@$(MAKE) --no-print-directory test-python

lint: env  ## Formats, lints and types, Rust and Python
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features python -q -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In debug mode the arithmetic is checked for overflow. The power cuts of the other tests take too long there.
test-rust: env
	cargo test --workspace --release
	cargo test --workspace --lib --quiet

# One thread each, on as many processes as there are cores: the models of the tests are small. Files start in the
# order of tests/conftest.py, the long ones first.
test-python: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-newest: RESOLUTION := highest
test-oldest: RESOLUTION := lowest-direct
test-newest test-oldest: test-%: env  ## The Python tests on the newest (oldest) packages that pyproject.toml allows
	@scripts/test_range.sh $* $(RESOLUTION) $(BIN)/uv $(PYTHON) "$(QUARK_CACHE)" $(PYTEST_ARGS)

bench: env  ## Measure the pool against its peers
	$(BIN)/python benches/bench_pool.py

goals: env  ## Measure the reliability goals (GOALS="--rows 1,2 --soak")
	$(BIN)/python scripts/goals.py $(GOALS)

docs: env  ## Build the documents as a site in target/site; fails at a broken link
	$(BIN)/python scripts/build_site.py

lock: env  ## Write the lock anew, with the newest packages that pyproject.toml allows
	PATH="$(BIN):$$PATH" $(BIN)/python scripts/lock.py

env: $(VENV)/.made  ## Build the extension in release mode into the environment
	@$(BIN)/maturin develop --release --quiet

$(VENV)/.made:
	@command -v cargo >/dev/null || { echo "Rust is missing: install it from https://rustup.rs and run make again"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
ifeq ($(TORCH),cpu)
	@echo "Making the environment in $(VENV): about 2 GB on disk, 0.6 GB to download, a few minutes the first time."
else
	@echo "Making the environment in $(VENV): about 6.5 GB on disk, 3.3 GB to download, most of it torch's CUDA packages;"
	@echo "five minutes the first time on a fast connection. Without a GPU, TORCH=cpu takes a third of the space."
endif
	@rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r locks/environment.txt
ifeq ($(TORCH),cpu)
	$(BIN)/uv pip install --quiet --no-deps --torch-backend cpu $$(sed -nE 's/^(torch==[^ ;]*).*/\1/p' locks/torch.txt) || { \
		echo "The build of torch without CUDA could not be installed: the index that uv takes it from may be out of reach."; \
		echo "Run the same command again later, or without TORCH=cpu for the build of the package registry."; exit 1; }
else
	$(PIP_INSTALL) -r locks/torch.txt
endif
	@touch $@

clean:  ## Remove build output (never an environment or a run)
	cargo clean
	rm -f quark/_pool_rs*.so
