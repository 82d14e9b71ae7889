# Every target makes its own virtual environment first. Nothing else is needed than Python >= 3.11.
#
# TORCH_ARGS: where pip takes torch from. On an ordinary Linux machine the pinned torch is the CUDA build with several
# GB of libraries; for a CPU-only machine say
#     make serve TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

# the first interpreter of these that is new enough
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13,$(shell \
    $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV ?= .venv
TORCH_ARGS ?=
SERVE_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

# of one test process; the ranks that a test starts count theirs themselves
TEST_ENV := OMP_NUM_THREADS=1 RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0 RAY_DEDUP_LOGS=0

.PHONY: serve install install-dev test test-deep check format bench clean

# --exit-with-parent: killing make, by SIGKILL too, ends the server
serve: $(INSTALLED)
	@exec $(BIN)/tidegate serve --exit-with-parent $(SERVE_ARGS)

install: $(INSTALLED)

install-dev: $(INSTALLED_DEV)

test: check $(INSTALLED_DEV)
	$(TEST_ENV) $(BIN)/python -m pytest -m "not deep and not gpu" $(PYTEST_ARGS)

test-deep: $(INSTALLED_DEV)
	$(TEST_ENV) TIDEGATE_DEEP=1 $(BIN)/python -m pytest -m "not gpu" --timeout 7200 $(PYTEST_ARGS)

check: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED_DEV)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(if $(PYTHON),:,echo "Tidegate needs Python 3.11 or newer; none was found (PYTHON=/path/to/python3.11)"; exit 1)
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing Tidegate and its dependencies into $(VENV): 1.6 GB with the CPU build of torch, several more"
	@echo "with the CUDA build, which is what pip takes on Linux unless TORCH_ARGS says otherwise (see Makefile)."
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH_ARGS) $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
