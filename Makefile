# make demo       install into .venv and show the library at work
# make test       the whole test suite
# make test-asan  the kernel tests once more, under AddressSanitizer and UBSan: the CPU's, and the
#                 CUDA kernels on an emulated GPU
# make lint       ruff, mypy, clang-format; `make format` repairs what can be repaired
# make clean      build products; .venv stays
#
# Everything sets itself up in .venv. A stamp there tells what is installed, and the kernels are
# recompiled only where a source changed, so a second run is offline and starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ASAN := build/asan
CSRC := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h tests/*/*.cpp tests/*/*.cu tests/*/*.h)

# One worker per core, one thread per worker.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-asan lint typecheck format clean native
.DELETE_ON_ERROR:
.NOTPARALLEL:

demo: $(VENV)/.demo native
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev native
	$(ONE_THREAD) $(PYTEST) $(PYTEST_FLAGS)

# libasan has to be the first library of the process, with libstdc++ beside it to catch its
# exceptions; Python itself is not free of leaks. Tests of torch's compiler add nothing here.
test-asan: $(VENV)/.dev
	EFFKERNELS_BUILD=cpu $(BIN)/python -m build_tools --sanitize --output $(ASAN)
	@echo "tests/ops and tests/cuda under AddressSanitizer and UndefinedBehaviorSanitizer:"
	$(ONE_THREAD) EFFKERNELS_LIBRARY=$(CURDIR)/$(ASAN)/_cpu.so EFFKERNELS_REQUIRE_NATIVE=1 \
	    EFFKERNELS_EMULATION=asan EFFKERNELS_HYPOTHESIS_PROFILE=asan \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    $(PYTEST) tests/ops tests/cuda \
	    --ignore=tests/cuda/test_compiled.py --ignore=tests/cuda/test_emulation.py \
	    -k "not opcheck and not compile and not mistakes" $(PYTEST_FLAGS)

lint: $(VENV)/.dev typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

# models/ is imported as effkernels.models, which mypy cannot know: it sees a tree of links that
# is laid out as the package is installed.
typecheck: $(VENV)/.dev
	@rm -rf build/typecheck && mkdir -p build/typecheck/effkernels
	@ln -s $(CURDIR)/effkernels/* build/typecheck/effkernels/
	@ln -s $(CURDIR)/models build/typecheck/effkernels/models
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml \
	    --cache-dir ../mypy-cache -p effkernels
	$(BIN)/mypy build_tools

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf build dist *.egg-info effkernels/_cpu.so effkernels/_cuda.so effkernels/_build_info.json
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Setting up, with plain pip. torch comes first: the isolated build of effkernels compiles against
# the environment's, and would otherwise unpack a second copy (5.5 GB, 2 minutes) for itself. pip
# says nothing unless something fails.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
TORCH = "$$($(BIN)/python -c 'from build_tools.locate import *; print(TORCH_REQUIREMENT)')" torchvision

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml setup.py | $(BIN)/python
	@echo "installing effkernels, torch and the demo's packages into $(VENV): about 5 minutes" \
	    "the first time"
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py | $(BIN)/python
	@echo "installing effkernels, torch and what tests and lint need into $(VENV): about 5" \
	    "minutes the first time"
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) -e '.[demo,test,lint]'
	@touch $@ $(VENV)/.demo

# Without pip and without network. What the installation has compiled is not compiled again.
native: | $(BIN)/python
	$(BIN)/python -m build_tools
