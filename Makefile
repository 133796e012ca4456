# Every target makes the virtual environment when it is missing; nothing has to be typed first.
#
#   make demo    the bundled model writes text; generation with and without the KV cache
#   make test    the whole suite: reference, Triton interpreter, ahead-of-time compiling, and on a GPU the gpu lane
#   make test-all  the same, every case of the executed lane instead of a sample, every kernel compiled ahead of time, and both
#                  once more with the oldest versions that are kept working: some hours of two cores
#   make bench   benchmarks beside transformers and llms_from_scratch; the report is out/bench/<machine>/report/report.md
#   make lint    ruff and mypy
#   make docs    the API reference, out/docs/index.html; a warning is an error

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Two workers suit two cores; each computes with one thread.
WORKERS ?= 2
# Python compiles what is imported; of the 12,500 files that are installed, few are.
QUIETLY = --quiet --no-compile
# What `make test-all` tests besides: see constraints.txt. Its interpreter needs the older numpy.
OLDEST ?= .venv-oldest
OLD = torch==2.11.0 triton==3.6.0 'numpy<2.4'

.PHONY: demo test test-all test-oldest bench lint docs clean

demo: $(VENV)/.installed
	$(BIN)/fastgpt demo

test: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/ptx_machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/fake_gpu

test-all: test test-oldest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/ptx_machine --all-cases
	OMP_NUM_THREADS=1 $(BIN)/python -m fastgpt_kernels.aot --jobs $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m fastgpt_kernels.aot --jobs $(WORKERS) --heads

test-oldest: $(OLDEST)/.tested
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) tests/ptx_machine --all-cases
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) tests/fake_gpu
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m fastgpt_kernels.aot --jobs $(WORKERS)

bench: $(VENV)/.tested
	$(BIN)/fastgpt bench

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every module without an underscore: pdoc alone leaves out those that a package's __all__ doesn't name. Two of its warnings are
# about itself: modules that it would have found too, and the types that NamedTuple makes of annotations.
SOURCES = $(wildcard fastgpt/*.py fastgpt/*/*.py fastgpt/*/*/*.py) $(patsubst kernels/%,%,$(wildcard kernels/fastgpt_kernels/*.py))
NAMES = $(subst /,.,$(patsubst %.py,%,$(patsubst %/__init__.py,%.py,$(SOURCES))))
MODULES = $(foreach name,$(NAMES),$(if $(findstring ._,$(name)),,$(name)))
STRICT = -W error -W "ignore:The module specification" -W "ignore:Error parsing type annotation ForwardRef"

docs: $(VENV)/.tested
	rm -rf out/docs
	$(BIN)/python $(STRICT) -m pdoc --docformat google --no-show-source --output-directory out/docs $(MODULES)

# torch and triton first and alone, so that the resolver takes the pinned wheels and nothing larger. Triton has no wheel for
# macOS or Windows; there the reference path is all there is.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIETLY) --constraint constraints.txt torch
	$(BIN)/python -m pip install $(QUIETLY) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install $(QUIETLY) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install $(QUIETLY) --no-deps llms-from-scratch==1.0.19 # its own dependencies include TensorFlow
	touch $@

$(OLDEST)/.tested: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(torch|triton|numpy)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install $(QUIETLY) $(OLD)
	$(OLDEST)/bin/python -m pip install $(QUIETLY) --constraint $(OLDEST)/constraints.txt $(OLD) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST)
