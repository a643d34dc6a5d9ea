# make train: a virtual environment, the package, and a policy for the embedded model.
# make test:  the same with the test extras, then the whole suite, on up to four cores; a test that hangs fails.
PYTHON ?= python3
VENV ?= .venv

.PHONY: train test
train: $(VENV)/train.stamp
	$(VENV)/bin/noisepolicy-train

test: $(VENV)/test.stamp
	$(VENV)/bin/pytest -n auto --maxprocesses 4 --dist worksteal -o faulthandler_exit_on_timeout=true

SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc noisepolicy export benchmarks -type f -not -path '*__pycache__*' -not -name '*.so')

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: a CPU build that is already pinned keeps every other package from pulling a CUDA one.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet -c constraints.txt torch
	touch $@

$(VENV)/train.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(VENV)/bin/pip install --quiet -c constraints.txt .
	touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(VENV)/bin/pip install --quiet -c constraints.txt '.[dev]'
	touch $@
