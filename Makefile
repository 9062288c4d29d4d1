# Every target works on a machine that has only Python 3.12 or newer and can reach a package index.
# What is installed lies in .venv, .venv-jax-* and .libtpu; removing these folders undoes it all.

# Arguments of the demo's sweep; its results go to ./demo.
DEMO = --out demo --widths 64 128 256 --presets mup sp --steps 75 \
  --learning-rates 2^-6.5..2^-4 --shifts sp=-1 --grids 'sp@256=2^-8.5..2^-6.5,2^-5.5' \
  --model.layers 2 --data.sequence-length 128 --data.batch-size 8 --optimizer.warmup-fraction 0.02

# Test processes. JAX compiles on one core, and compiling is most of what the tests do.
TEST_JOBS = 2

# The oldest jax that we support; the kernels are tested with it as well.
OLD_JAX = 0.11.2

# The first of these that is new enough makes .venv: 3.12 first, which constraints.txt was made with.
# `make PYTHON=/path/to/python` names another.
PYTHON_CANDIDATES = $(if $(PYTHON),$(PYTHON),python3.12 python3.13 python3.14 python3 python)

OLD_VENV = .venv-jax-$(OLD_JAX)
# The lock makes the compilation cache safe for several test processes; the bound (4 GB) switches the lock on.
SHARED_CACHE = JAX_COMPILATION_CACHE_MAX_SIZE=4000000000
PYTEST = $(SHARED_CACHE) .venv/bin/python -m pytest

# libtpu, the TPU compiler, exists for this platform only; where it does, its tests must run.
ifeq ($(shell uname -s -m),Linux x86_64)
TPU_COMPILER = .libtpu/installed
PYTEST := GDN_REQUIRE_TPU_COMPILER=1 $(PYTEST)
endif

.PHONY: help install demo results test slow long lint check-pins test-old-jax tpu-compiler

help:
	@echo "make install       Python environment in .venv"
	@echo "make demo          a small sweep over width and learning rate, in minutes, on a CPU"
	@echo "make results       reports, pictures and tables of docs/results again, from the committed rows"
	@echo "make test          the tests"
	@echo "make slow          the tests that take tens of seconds each"
	@echo "make long          the tests that take minutes each, the whole demo among them"
	@echo "make lint          formatting, lint and types"
	@echo "make test-old-jax  the kernel tests with jax $(OLD_JAX), in an environment of their own"
	@echo "make tpu-compiler  the TPU compiler in .libtpu, which needs no TPU (Linux on x86-64 only)"
	@echo "make check-pins    .venv holds exactly the versions of constraints.txt"

install: .venv/installed
	@:

demo: install
	@.venv/bin/gdn sweep $(DEMO)

results: install
	@.venv/bin/python -m train.results docs/results

test: install tpu-compiler
	@$(PYTEST) -n $(TEST_JOBS) --dist worksteal

slow: install tpu-compiler
	@$(PYTEST) -n $(TEST_JOBS) --dist worksteal -m 'slow and not long'

long: install tpu-compiler
	@$(PYTEST) -m long

lint: install
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/basedpyright

tpu-compiler: $(TPU_COMPILER)
	@$(if $(TPU_COMPILER),:,echo "the TPU compiler exists for Linux on x86-64 only: its tests will be skipped")

check-pins: install
	@frozen=$$(.venv/bin/python -m pip freeze --exclude-editable) && test -n "$$frozen" && \
	if echo "$$frozen" | grep -vxFf constraints.txt; then \
	  echo "installed, but not what constraints.txt says (above); its head says how to renew it" >&2; exit 1; \
	fi

test-old-jax: $(OLD_VENV)/installed
	@$(SHARED_CACHE) $(OLD_VENV)/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal -m 'not long' tests/test_kernel_*.py

# Not into .venv: there every command of jax would look for a TPU to start.
.libtpu/installed: constraints.txt | .venv/installed
	@echo "installing the TPU compiler into .libtpu: 640 MB, a minute"
	@rm -rf .libtpu
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .libtpu \
	  -c constraints.txt libtpu
	@touch $@

# A suitable Python makes an environment with pip; others say nothing and fail.
SUITABLE = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null

# $(call make-venv,FOLDER): keeps a folder whose Python is suitable.
define make-venv
	@if ! $(1)/bin/python $(SUITABLE); then \
	  for python in $(PYTHON_CANDIDATES); do \
	    if "$$python" $(SUITABLE); then \
	      echo "making $(1) with $$("$$python" -V) ($$(command -v "$$python"))"; \
	      exec "$$python" -m venv --clear $(1); \
	    fi; \
	  done; \
	  echo "gdn needs Python 3.12 or newer with its venv module. Looked at:" >&2; \
	  for python in $(PYTHON_CANDIDATES); do \
	    echo "  $$python: $$("$$python" -V 2>/dev/null || echo not found)" >&2; \
	  done; \
	  echo "Install one (apt install python3.12 python3.12-venv; brew install python@3.12; pyenv install 3.12;" >&2; \
	  echo "uv python install 3.12) and run make again, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	  exit 1; \
	fi
endef

.venv/installed: pyproject.toml constraints.txt
	$(call make-venv,.venv)
	@echo "installing into .venv: 1.3 GB, a minute or two"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@
	@echo "installed: .venv/bin/gdn --help"

# The same versions but for jax, and of the extras only what the kernel tests import; filelock is the lock of the cache.
$(OLD_VENV)/installed: pyproject.toml constraints.txt
	$(call make-venv,$(OLD_VENV))
	@echo "installing jax $(OLD_JAX) into $(OLD_VENV)"
	@sed -E 's/^(jax|jaxlib)==.*/\1==$(OLD_JAX)/' constraints.txt > $(OLD_VENV)/constraints.txt
	@$(OLD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLD_VENV)/constraints.txt \
	  -e . beartype filelock hypothesis pytest pytest-timeout pytest-xdist
	@touch $@
