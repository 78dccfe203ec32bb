# Two commands do everything on a fresh machine, set-up included: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# Where torch comes from: empty is pip's own index. For the small CPU build on Linux:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Older versions that the patches cover, besides the one in constraints.txt.
MEGATRON_VERSIONS ?= 0.14.0 0.15.3
# Transformer Engine versions whose Python code the tests run: the oldest and newest supported, one in between.
TE_VERSIONS ?= 2.9.0 2.13.0 2.20.2
SWEEP ?= slurm/sweeps/qwen3-tiny-cpu.yaml

READY := $(VENV)/.ready
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

export PYTHONUNBUFFERED := 1

.PHONY: help venv demo test test-megatron test-te lint bench clean distclean

help:
	@echo "make demo    train Qwen3 at TP=1/2/4/8, stock and patched; compare every bit; draw the picture"
	@echo "make test    run the tests; test-megatron only those against older versions of megatron-core,"
	@echo "             test-te only those of Transformer Engine's layers (TE $(TE_VERSIONS), on CPU)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   what the patches cost, as ratios to stock"
	@echo "make venv    only set up $(VENV) (the others do it when needed)"
	@echo "make clean   remove caches and the demo's results; distclean also $(VENV)"

venv: $(READY)

# torch first, at its exact version: nothing may ever resolve a bare "torch".
$(READY): setup.py constraints.txt
	@echo "==> setting up $(VENV) (once; some minutes, most of them for torch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing $$(grep '^torch==' constraints.txt)"
	@$(PIP) install -c constraints.txt setuptools "$$(grep '^torch==' constraints.txt)" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@echo "==> installing tpcheck, its dependencies and the development tools"
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "==> $(VENV) is ready"

demo: $(READY)
	@echo "==> sweep $(SWEEP): completed cells are kept, 'make clean' starts over"
	@$(BIN)/tpcheck sweep $(SWEEP)

test: $(READY) test-megatron test-te
	@echo "==> tests"
	@$(BIN)/python -m pytest

test-megatron: $(MEGATRON_VERSIONS:%=$(VENV)/megatron-core-%)
	@for version in $(MEGATRON_VERSIONS); do \
	    echo "==> the patches on megatron-core $$version"; \
	    PYTHONPATH=$(VENV)/megatron-core-$$version $(BIN)/python -m pytest -q -W ignore tests/test_megatron.py \
	        tests/test_patches.py -k "under_tree and (qwen3 or distributed or initialised) or very_object" || exit 1; \
	done

$(VENV)/megatron-core-%: $(READY)
	@echo "==> installing megatron-core $* beside the other"
	@$(PIP) install --no-deps --target $@ megatron-core==$*

# TE's wheel holds its Python code alone; tests/te_cpu stands in for the compiled part.
test-te: $(TE_VERSIONS:%=$(VENV)/te-%)
	@for version in $(TE_VERSIONS); do \
	    echo "==> whole models and refusals on Transformer Engine $$version"; \
	    PYTHONPATH=$(VENV)/te-$$version $(BIN)/python -m pytest -q -W ignore tests/test_te_megatron.py \
	        tests/test_te_refusals.py || exit 1; \
	done
	@for version in $(firstword $(TE_VERSIONS)) $(lastword $(TE_VERSIONS)); do \
	    echo "==> modules on Transformer Engine $$version"; \
	    PYTHONPATH=$(VENV)/te-$$version $(BIN)/python -m pytest -q -W ignore tests/test_te_modules.py || exit 1; \
	done
	@echo "==> each patch left out, and the trainer, on Transformer Engine $(lastword $(TE_VERSIONS))"
	@PYTHONPATH=$(VENV)/te-$(lastword $(TE_VERSIONS)) $(BIN)/python -m pytest -q -W ignore tests/test_te_ablation.py \
	    tests/test_te_train.py tests/test_te_trace.py

$(VENV)/te-%: $(READY)
	@echo "==> unpacking Transformer Engine $*"
	@rm -rf $@
	@$(PIP) install --no-deps --target $@ transformer-engine==$*

lint: $(READY)
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

bench: $(READY)
	@echo "==> benchmarks"
	@$(BIN)/python tests/bench.py

clean:
	@echo "==> removing caches and results/qwen3-tiny-cpu"
	@rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis results/qwen3-tiny-cpu
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@echo "==> removing $(VENV)"
	@rm -rf $(VENV)
