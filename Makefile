# Two commands do everything on a fresh machine, set-up included: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# Where torch comes from: empty is pip's own index. For the small CPU build on Linux:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Versions that the patches cover, besides the one in constraints.txt: older ones run; newer ones, which may be for a
# newer Python, are read and run, too.
MEGATRON_VERSIONS ?= 0.14.0 0.15.3
NEWER_MEGATRON_VERSIONS ?= 0.17.1 0.18.2 0.19.2
# Transformer Engine versions whose Python code the tests run: the oldest and newest supported, one in between.
TE_VERSIONS ?= 2.9.0 2.13.0 2.20.2
# The compiler that the GPU kernels are checked with, and a NumPy that its interpreter runs on: later ones refuse to
# index by arrays of one element.
TRITON_VERSION ?= 3.6.0
TRITON_NUMPY ?= 2.2.6
# Carried to GPU machines that have no network, and for which Python; what `make gpu` measures there.
WHEELS ?= wheels
WHEELS_PYTHON ?= 3.12
GPU_RESULTS ?= results/gpu
# A checkout of Megatron-LM for test-megatron-lm.
MEGATRON_LM ?=
SWEEP ?= slurm/sweeps/qwen3-tiny-cpu.yaml
LAYOUTS ?= slurm/sweeps/qwen3-tiny-layouts.yaml

READY := $(VENV)/.ready
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

# Tests wait, for ranks and for time to pass: three at a time keep two cores busy.
PYTEST := $(BIN)/python -m pytest -n 3 --dist worksteal

export PYTHONUNBUFFERED := 1

.PHONY: help venv demo test test-megatron test-megatron-lm test-te test-kernels test-slurm \
    test-frameworks test-studies te-coverage gpu wheels lint bench silent-bugs fuzz clean distclean

help:
	@echo "make demo    train Qwen3 at TP=1/2/4/8, stock and patched; then at seven layouts; compare every bit; draw the picture"
	@echo "make test    run the tests"
	@echo "make test-megatron  the patches on other versions of megatron-core: $(MEGATRON_VERSIONS) $(NEWER_MEGATRON_VERSIONS)"
	@echo "make test-te  the patches of Transformer Engine's layers, on a CPU: TE $(TE_VERSIONS)"
	@echo "make test-megatron-lm MEGATRON_LM=path  Megatron-LM's own pretrain_gpt.py, unmodified, on a checkout"
	@echo "make test-kernels  the GPU kernels without a GPU: in Triton's interpreter, and what the compiler makes of them"
	@echo "make te-coverage  which lines of Transformer Engine's layers those tests run"
	@echo "make gpu     on a GPU machine, within ten minutes: a layer against stock, kernels, bits, into $(GPU_RESULTS)/<device>"
	@echo "make wheels  what make gpu may miss there, fetched here into $(WHEELS), to be carried along"
	@echo "make test-slurm  the tests that start a real Slurm on this machine: two architectures, faults, accounting"
	@echo "make test-frameworks  traces of Hugging Face models and DeepSpeed, installed for it"
	@echo "make test-studies  what each study finds, at its quick size; Keras and JAX are installed for it, too"
	@echo "make lint    ruff and mypy"
	@echo "make bench   what the patches cost, as ratios to stock"
	@echo "make silent-bugs  a hundred silent bugs put into real runs, and whether tpcheck compare finds them"
	@echo "make fuzz    every command on thousands of mutated files"
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
	@echo "==> sweep $(LAYOUTS): one run, any layout"
	@$(BIN)/tpcheck sweep $(LAYOUTS)

test: $(READY)
	@echo "==> tests"
	@$(PYTEST) --ignore tests/patches/kernels $(STUDIES:%=--ignore %)

colon = $(subst $() ,:,$(strip $(1)))

# The code of newer versions runs on an older Python than they ask for; what of Triton it imports is not called.
test-megatron: $(VENV)/triton-$(TRITON_VERSION) \
    $(MEGATRON_VERSIONS:%=$(VENV)/megatron-core-%) $(NEWER_MEGATRON_VERSIONS:%=$(VENV)/megatron-core-%)
	@echo "==> call sites in megatron-core $(NEWER_MEGATRON_VERSIONS)"
	@MEGATRON_SOURCES=$(call colon,$(NEWER_MEGATRON_VERSIONS:%=$(VENV)/megatron-core-%)) \
	    $(BIN)/python -m pytest -q -W ignore tests/patches/test_call_sites.py
	@for version in $(MEGATRON_VERSIONS); do \
	    echo "==> the patches on megatron-core $$version"; \
	    PYTHONPATH=$(VENV)/megatron-core-$$version $(PYTEST) -q -W ignore tests/patches/megatron/test_training.py \
	        tests/patches/megatron/test_order_free.py tests/patches/megatron/test_context_parallel.py \
	        tests/patches/megatron/test_blockwise.py \
	        tests/patches/test_patches.py tests/patches/megatron/test_initial_weights.py tests/patches/megatron/test_fully_reshardable.py \
	        tests/patches/megatron/moe/test_refusals.py \
	        -k "other_versions or under_tree and (qwen3 or distributed or initialised) or every_layout and tied or very_object or weights or saved or by_blocks and (qwen3 or unfused)" || exit 1; \
	done
	@for version in $(NEWER_MEGATRON_VERSIONS); do \
	    echo "==> the patches on megatron-core $$version"; \
	    PYTHONPATH=$(VENV)/megatron-core-$$version:tests/support/typing_override:$< $(PYTEST) -q -W ignore \
	        tests/patches/megatron/test_training.py tests/patches/megatron/test_order_free.py tests/patches/megatron/moe \
	        -k "test_refusals or test_router or every_tp and qwen3 or every_layout and (tied or balanced or shared) or halves" \
	        || exit 1; \
	done

$(VENV)/megatron-core-%: $(READY)
	@echo "==> installing megatron-core $* beside the other"
	@$(PIP) install --no-deps --target $@ $(if $(filter $*,$(NEWER_MEGATRON_VERSIONS)),$(FOR_NEWER_PYTHON)) megatron-core==$*

FOR_NEWER_PYTHON := --only-binary=:all: --python-version 3.13 --ignore-requires-python

# Megatron-LM's scripts are no package: MEGATRON_LM names a checkout, whose data helpers are compiled for this Python.
test-megatron-lm: $(VENV)/megatron-lm
	@test -f "$(MEGATRON_LM)/pretrain_gpt.py" || { echo "MEGATRON_LM=$(MEGATRON_LM): no pretrain_gpt.py in it" >&2; exit 2; }
	@echo "==> Megatron-LM's own pretrain_gpt.py in $(MEGATRON_LM)"
	@PATH="$$($(BIN)/python -c 'import sys; print(sys.base_prefix)')/bin:$$PATH" OMP_NUM_THREADS=1 \
	    MEGATRON_LM=$(abspath $(MEGATRON_LM)) \
	    PYTHONPATH=$(abspath $(MEGATRON_LM)):$(abspath $<):$(abspath tests/support/typing_override) \
	    $(BIN)/python -m pytest -q -W ignore tests/megatron_lm/test_megatron_lm.py

$(VENV)/megatron-lm: $(READY) tests/megatron_lm/requirements.txt
	@echo "==> installing what Megatron-LM's scripts import beside the rest"
	@rm -rf $@
	@$(PIP) install --no-deps --target $@ -r tests/megatron_lm/requirements.txt

# TE's wheel holds its Python code alone; tests/support/te_cpu stands in for the compiled part.
test-te: $(TE_VERSIONS:%=$(VENV)/te-%)
	@for version in $(TE_VERSIONS); do \
	    echo "==> whole models and refusals on Transformer Engine $$version"; \
	    PYTHONPATH=$(VENV)/te-$$version $(PYTEST) -q -W ignore tests/patches/te/test_megatron.py \
	        tests/patches/te/test_attention.py tests/patches/te/test_refusals.py || exit 1; \
	done
	@for version in $(firstword $(TE_VERSIONS)) $(lastword $(TE_VERSIONS)); do \
	    echo "==> modules and mixtures of experts on Transformer Engine $$version"; \
	    PYTHONPATH=$(VENV)/te-$$version $(PYTEST) -q -W ignore tests/patches/te/test_modules.py \
	        tests/patches/te/test_mixture.py || exit 1; \
	done
	@echo "==> each patch left out, and the trainer, on Transformer Engine $(lastword $(TE_VERSIONS))"
	@PYTHONPATH=$(VENV)/te-$(lastword $(TE_VERSIONS)) $(PYTEST) -q -W ignore tests/patches/te/test_ablation.py \
	    tests/patches/te/test_train.py tests/patches/te/test_trace.py

# Each rank of every test counts; forwards that the patches replace run in the stock tests.
te-coverage: $(VENV)/te-$(lastword $(TE_VERSIONS))
	@echo "==> coverage of Transformer Engine $(lastword $(TE_VERSIONS))"
	@PYTHONPATH=$< $(BIN)/coverage run -m pytest -q -W ignore tests/patches/te/test_modules.py tests/patches/te/test_megatron.py
	@$(BIN)/coverage combine --quiet && $(BIN)/coverage report

# No $(VENV): a GPU's torch and Transformer Engine belong to the environment they came with.
gpu:
	@$(PYTHON) -m tests.gpu.suite --wheels $(WHEELS) --results $(GPU_RESULTS)

# For the Python of GPU machines, whatever runs here; pip takes a platform by its exact name.
wheels:
	@echo "==> wheels for a GPU machine without network, into $(WHEELS)"
	@rm -rf $(WHEELS)
	@$(PYTHON) -m pip --disable-pip-version-check --quiet --quiet download --no-deps --only-binary=:all: \
	    --python-version $(WHEELS_PYTHON) --implementation cp \
	    $(foreach libc,28 27 24 17 12 5,--platform manylinux_2_$(libc)_x86_64) --platform manylinux2014_x86_64 \
	    -d $(WHEELS) -c constraints.txt -r tests/gpu/requirements.txt
	@du -sh $(WHEELS)

$(VENV)/te-%: $(READY)
	@echo "==> unpacking Transformer Engine $*"
	@rm -rf $@
	@$(PIP) install --no-deps --target $@ transformer-engine==$*

test-kernels: $(VENV)/triton-$(TRITON_VERSION) $(VENV)/te-$(lastword $(TE_VERSIONS))
	@echo "==> GPU kernels in the interpreter of Triton $(TRITON_VERSION)"
	@PYTHONPATH=$< $(PYTEST) -q -W ignore tests/patches/kernels
	@echo "==> the same under Transformer Engine's layers"
	@TRITON_INTERPRET=1 PYTHONPATH=$(call colon,$^) $(PYTEST) -q -W ignore tests/patches/kernels/test_ops_on_kernels.py -k transformer
	@echo "==> GPU kernels compiled for sm_90, sm_100 and sm_103"
	@PYTHONPATH=$< $(BIN)/python -m tests.patches.kernels.static_kernels

$(VENV)/triton-%: $(READY)
	@echo "==> unpacking Triton $*"
	@rm -rf $@
	@$(PIP) install --no-deps --target $@ triton==$* numpy==$(TRITON_NUMPY)

test-slurm: $(READY)
	@echo "==> sweeps on a real Slurm, and what can happen to them"
	@$(BIN)/python -m pytest -m slurm --durations=15 tests/slurm/real

test-frameworks: $(VENV)/frameworks
	@echo "==> traces of Hugging Face models and DeepSpeed"
	@DS_ACCELERATOR=cpu PYTHONPATH=$< $(PYTEST) -q -W ignore tests/trace/test_hugging_face.py tests/trace/test_deepspeed.py

STUDIES := $(filter-out %/test_house.py,$(wildcard tests/study/test_*.py))
test-studies: $(VENV)/frameworks
	@echo "==> studies"
	@$(PYTEST) --dist loadfile -q $(STUDIES)
	@echo "==> studies of frameworks; of Keras and JAX"
	@DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=$< $(PYTEST) --dist loadfile -q -W ignore \
	    tests/study/test_frameworks.py tests/study/test_keras_jax.py

$(VENV)/frameworks: $(READY) constraints.txt tests/trace/frameworks.txt
	@echo "==> installing transformers, DeepSpeed, Keras and JAX beside the rest"
	@rm -rf $@
	@$(PIP) install --no-deps --target $@ -c constraints.txt -r tests/trace/frameworks.txt
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu PYTHONPATH=$@ \
	    $(PIP) install --no-deps --no-build-isolation --target $@ -c constraints.txt deepspeed

lint: $(READY)
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

bench: $(READY)
	@echo "==> benchmarks"
	@$(BIN)/python -m tests.bench

# Of each kind.
CASES ?= 1000
fuzz: $(READY)
	@$(BIN)/python -W ignore -m tests.fuzz --output results/reliability --cases $(CASES)

silent-bugs: $(READY)
	@echo "==> silent bugs: minutes; writes results/silent_bugs"
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.silent_bugs

clean:
	@echo "==> removing caches and results/qwen3-tiny-cpu"
	@rm -rf build *.egg-info .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis results/qwen3-tiny-cpu \
	    results/qwen3-tiny-layouts
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@echo "==> removing $(VENV) and $(WHEELS)"
	@rm -rf $(VENV) $(WHEELS)
