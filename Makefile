# make pretrain   set up .venv, then pretrain the demo and write its tables, curves and heat maps to a folder in runs/
# make test       set up .venv, then run all tests but those marked learning
# make aot        set up .venv, compile every variant of the Triton kernels for four GPUs; no GPU is needed
# make docs       the documentation as a site, in build/site, without a network
# make lint, make clean; make setup only prepares .venv
# make bench      set up .venv, run the benchmarks, write benchmarks/results; make report: README's table and the plots
# make gpu        build, tests and benchmarks on a GPU machine without a network, see benchmarks/gpu.sh; make gpu-clean
# PYTHON=python3.12 make ... chooses the interpreter .venv is made of (3.10 or newer)

PYTHON ?= python3
VENV := $(CURDIR)/.venv
STAMP := $(VENV)/.installed
# the editable install compiles the extension, so its sources make it out of date too
SOURCES := pyproject.toml constraints.txt $(wildcard setup.py build_backend.py csrc/*.* csrc/*/*.*)

export PATH := $(VENV)/bin:$(PATH)

.PHONY: pretrain test aot docs lint bench report gpu gpu-clean setup clean
.DEFAULT_GOAL := test

pretrain: $(STAMP)
	deepspeed softmask_fast/train.py --deepspeed ds.json

# two processes share the cores, so waiting threads must not spin; tests/conftest.py orders the files
test: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

aot: $(STAMP)
	SOFTMASK_FAST_AOT=all python -m pytest tests/test_aot.py

bench: $(STAMP)
	python -m pytest benchmarks --benchmark-only --save-results

report: $(STAMP)
	python benchmarks/report.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

gpu:
	PYTHON=$(firstword $(wildcard $(VENV)/bin/python) $(PYTHON)) PART="$(PART)" benchmarks/gpu.sh

gpu-clean:
	rm -rf runs/gpu

lint: $(STAMP)
	ruff check .
	ruff format --check .

setup: $(STAMP)

# Build isolation is off because the extension compiles against the torch in .venv, which is therefore installed first;
# so is pip, because the one that comes with Python 3.10 searches for common versions without end.
$(STAMP): $(SOURCES)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, found " + sys.version)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools wheel ninja numpy torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[train,bench,dev,docs]'
	touch $(STAMP)

# .venv itself stays (several GB); without its stamp the next make installs, and compiles, again
clean:
	rm -rf $(STAMP) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find softmask_fast -name '*.so' -delete
	find $(wildcard softmask_fast tests benchmarks) -name __pycache__ -prune -exec rm -rf {} +
