# make train     set everything up and train
# make test      set everything up and run the tests
# make lint      set everything up and check style and types
# make shapes    run the numeric tests with every shape annotation checked
# make others    run the other tests that depend most on JAX
# make compiled  run the tests that compile for GPUs and TPUs, on a CPU
# make help      print this
#
# ARGS go to train_gpt.py or pytest:    make train ARGS="--preset laptop --num-steps 100"
# PYTHON is 3.11 or newer:              make train PYTHON=python3.13
# ACCELERATOR is cuda12, cuda13, tpu or cpu; by default what the machine seems to have.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
ACCELERATOR ?= $(shell if [ -e /dev/nvidia0 ]; then echo cuda12; \
	elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then echo tpu; else echo cpu; fi)
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --editable
NUMERIC = tests/model/test_attention.py tests/model/test_bigrams.py tests/model/test_composed.py \
	tests/model/test_connections.py tests/model/test_gates.py tests/model/test_gpt.py \
	tests/model/test_loss.py tests/model/test_rotary.py tests/model/test_softcap.py tests/optim \
	tests/data/test_batches.py tests/training/test_step.py
# Of slow files, a test that calls what is annotated.
ANNOTATED = tests/model/kernels/test_flash_attention.py::test_it_computes_what_the_reference_does \
	tests/inference/test_generate.py::test_in_bfloat16_the_probabilities_are_nearly_those_of_float32
# What else another JAX could break.
DEPENDENT = tests/model tests/devices tests/training tests/inference tests/test_train_gpt.py
# Of these, what is slow and not about JAX, or numeric.
APART = $(NUMERIC) tests/devices/test_launchers.py tests/inference/test_playground.py \
	tests/training/test_interruption.py tests/training/test_resume.py
# Compilers have an environment of their own, since JAX looks for a TPU wherever libtpu is installed,
# and the plugin for CUDA writes to standard error that it finds no driver.
COMPILERS = $(VENV)-compilers
COMPILING = cpu,dev,gpu-compiler,tpu-compiler

.PHONY: train test lint shapes others compiled help

train: $(VENV)/ready-$(ACCELERATOR)
	$(VENV)/bin/python train_gpt.py $(ARGS)

test: $(VENV)/ready-dev
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

shapes: $(VENV)/ready-dev
	$(VENV)/bin/python -m pytest -n 2 --jaxtyping-packages=nanogpt,tests.typechecker.check \
		$(NUMERIC) $(ANNOTATED) $(ARGS)

others: $(VENV)/ready-dev
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
		$(DEPENDENT) $(APART:%=--ignore %) $(ARGS)

compiled:
	@$(MAKE) VENV=$(COMPILERS) ACCELERATOR=$(COMPILING) $(COMPILERS)/ready-$(COMPILING)
	$(COMPILERS)/bin/python -m pytest -n 2 --dist loadfile \
		tests/benchmarks/compiled/test_h200.py tests/benchmarks/compiled/test_tpu.py $(ARGS)

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

$(VENV)/ready-$(ACCELERATOR): $(VENV)/bin/python requirements.txt pyproject.toml
	@echo "Installing what training needs into $(VENV); this takes a minute."
	@$(INSTALL) ".[$(ACCELERATOR)]"
	@echo "Installed. To run anything but make, first type: source $(VENV)/bin/activate"
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready-$(ACCELERATOR)
	@echo "Installing what the tests need into $(VENV); this takes a minute."
	@$(INSTALL) ".[$(ACCELERATOR),dev]"
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; choose one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
