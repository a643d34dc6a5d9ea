# make train: a virtual environment, the package, and a policy for the embedded model. Each step says what it installs.
# make test:  the same with the test extras, then the whole suite, on up to four cores; a test that hangs fails.
# make test-all: the suite with every planted bug and every long parametrisation, and the fault tests and fuzzers for hours.
# make test-lowest, test-newest: the quick tests with the lowest versions that pyproject.toml allows, which uv reads there,
#   and with the newest released ones; each in an environment of its own, made anew.
# make docs: the documentation site in site/, with its tutorials run (in a temporary folder, where their runs stay); docs-serve: the same at 127.0.0.1:8000, not run.
PYTHON ?= python3
VENV ?= .venv

# The fastest engine for the embedded model: OpenVINO, in bfloat16 where the processor computes in it; PyTorch on a GPU.
ifeq ($(shell command -v nvidia-smi),)
ENGINE := --engine openvino $(if $(shell grep -om1 'avx512_bf16\|amx_bf16' /proc/cpuinfo 2> /dev/null),--engine-dtype bfloat16)
endif

.PHONY: train test test-all test-lowest test-newest docs docs-serve
train: $(VENV)/train.stamp
	@$(VENV)/bin/noisepolicy-train $(ENGINE)

test: $(VENV)/test.stamp
	$(VENV)/bin/pytest $(PARALLEL)

test-all: $(VENV)/test.stamp
	$(VENV)/bin/pytest $(PARALLEL) --mutants --soak

docs: $(VENV)/docs.stamp
	cd $$(mktemp -d) && NOISEPOLICY_DOCS_EXECUTE=true $(abspath $(VENV)/bin/mkdocs) build --strict -f $(CURDIR)/mkdocs.yml

docs-serve: $(VENV)/docs.stamp
	$(VENV)/bin/mkdocs serve

PARALLEL := -n auto --maxprocesses 4 --dist worksteal -o faulthandler_exit_on_timeout=true
QUICK_TESTS := tests/ops tests/policies tests/frozen tests/worlds/shapes/test_model.py
TRAINING_RUN := tests/cli/test_train.py::test_a_run_from_start_to_report

test-lowest: RESOLUTION := lowest-direct
# The many pipelines are those of the newest diffusers.
test-lowest: LEFT_OUT := $(addprefix --ignore tests/frozen/test_,pipelines.py published.py modular.py)
test-newest: RESOLUTION := highest
test-lowest test-newest: test-%:
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet uv
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --resolution $(RESOLUTION) \
	  '.[benchmarks,onnx,openvino,server,tensorboard]'
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python pytest pytest-xdist
	$(VENV)-$*/bin/pytest $(PARALLEL) -m "not slow" $(LEFT_OUT) $(QUICK_TESTS)
	$(VENV)-$*/bin/pytest $(TRAINING_RUN)

SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc noisepolicy export benchmarks integrations -type f -not -path '*__pycache__*' -not -name '*.so')

# pip's remarks on its own version and on root, which are not about this package.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

$(VENV)/bin/python:
	@echo "creating a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch first and alone: a CPU build that is already pinned keeps every other package from pulling a CUDA one.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/bin/python
	@echo "installing $$(sed -n "s/^torch==/torch /p" constraints.txt)"
	@$(VENV)/bin/pip install --quiet -c constraints.txt torch
	@touch $@

$(VENV)/train.stamp: $(VENV)/torch.stamp $(SOURCES)
	@echo "installing noisepolicy and what it needs, and compiling its kernels"
	@$(VENV)/bin/pip install --quiet -c constraints.txt '.$(if $(ENGINE),[openvino])'
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp $(SOURCES)
	@echo "installing noisepolicy and what its tests need, and compiling its kernels"
	@$(VENV)/bin/pip install --quiet -c constraints.txt '.[dev]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/torch.stamp $(SOURCES)
	@echo "installing noisepolicy and what its documentation needs, and compiling its kernels"
	@$(VENV)/bin/pip install --quiet -c constraints.txt '.[docs]'
	@touch $@
