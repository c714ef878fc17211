# Each target sets up what it needs: a virtual environment, pinned packages, an editable install.
#   make transfer ARGS="--depths 8 16 32"     make test ARGS="-k residual"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet
NATIVE := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: transfer test sanitize lint audit bench reproduce wheel clean

transfer: $(VENV)/.transfer
	$(BIN)/depthnet transfer $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

# The tests of the native kernels, built to report memory errors, undefined behaviour and data races.
sanitize: $(VENV)/.dev
	$(PIP) setuptools pybind11
	VENV=$(VENV) .ci/sanitize address
	VENV=$(VENV) .ci/sanitize thread

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The GPU kernels compiled ahead of time, without a GPU: registers, spills, widths of accesses, launches; and
# the time that a step should take.
audit: $(VENV)/.dev
	$(BIN)/python bench/gpu_audit.py
	$(BIN)/python bench/roofline.py
	VENV=$(VENV) .ci/cuda

# Timings of one run may be compared with each other, never with those of another run.  ARGS are throughput.py's.
bench: $(VENV)/.run
	$(BIN)/python bench/residual.py
	$(BIN)/python bench/optimizer.py
	$(BIN)/python bench/throughput.py $(ARGS)
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/sweep.py
	$(BIN)/python bench/plot.py

# The claims of the paper, measured: every study of `depthnet reproduce`, and docs/reproduction.md.
reproduce: $(VENV)/.run
	$(BIN)/python bench/reproduction.py

wheel: $(VENV)/.dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist runs *.egg-info depthnet/_C*.so depthnet/_C*_left_out.txt

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch and depthnet into $(VENV); about two minutes."
	touch $@

# Only what `depthnet transfer` uses, so that it starts soon: no GPU kernels, torch's jinja2 for the report,
# and bytecode of what is imported, when it is.  The kernels compile while the packages are installed.
$(VENV)/.transfer: $(VENV)/.python $(NATIVE)
	$(PIP) --no-compile torch==2.13.0 matplotlib optuna rich & packages=$$!; \
	  DEPTHNET_CUDA=0 $(PIP) --no-deps --editable . && wait $$packages
	$(BIN)/depthnet doctor
	touch $@

# It has all that .transfer has, and GPU kernels that .transfer would take away.
$(VENV)/.run: $(VENV)/.python $(NATIVE)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[cli,data,language,plot,report,stats,sweep]'
	$(BIN)/depthnet doctor
	touch $@ $(VENV)/.transfer

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[dev]'
	touch $@
