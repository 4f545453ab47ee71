# Each target does everything it needs on a fresh machine: a virtual environment with pinned packages, the native build,
# then the work itself. Stamp files under $(VENV) make second runs incremental.
#
#   PYTHON=python3.12   interpreter to make the environment with      VENV=.venv    where it goes
#   ARGS="--quick"      arguments passed on by `make demo`, `make test`, `make bench` and `make instructions`
#   WORKERS=0           test in one process (default: one per core, at most 4)
#   HF=5.17.0           transformers for `make test-hf`               REAL=build/real where `make test-real` keeps downloads
#   FUSEDKV_CUDA=0 / 1  without CUDA / with CUDA or not at all        TORCH_CUDA_ARCH_LIST="9.0a"
#   BUNDLE_PYTHON=python3.12 BUNDLE_TORCH=2.11.0   those of the GPU machine, for `make gpu-bundle`
#   CUDA_OBJECTS_ARCHS="10.0a;12.0a" CUDA_OBJECTS=build/blackwell     other architectures for `make cuda-objects`

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
FUSEDKV_CUDA ?=
WORKERS ?= auto
HF ?= 5.17.0
REAL ?= build/real

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(abspath $(VENV))/bin
# -qq leaves pip's errors and drops its chatter.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
DEPS := $(VENV)/.deps-stamp
NATIVE := $(VENV)/.native-stamp
BUNDLE := build/gpu-bundle
BUNDLE_PYTHON ?= python3.12
BUNDLE_TORCH ?= 2.11.0
BUNDLE_VENV ?= build/gpu-bundle-venv
CUDA_OBJECTS ?= build/cuda-objects
CUDA_OBJECTS_ARCHS ?= 8.0;9.0a
WHEEL_MAX_KB := 40000
SIMT := build/simt/_C_simt.so
SANITIZE := build/sanitize
# Tests of the CPU ops, on every SIMD target.
SANITIZE_TESTS := $(addprefix python_tests/ops/test_,levels.py fuse_kv.py fuse_kvcache.py append_kvcache.py \
    attn_with_kvcache.py coded_attention.py coded_append.py head_dims.py large_results.py merging.py)
COUNTER := build/count_instructions
# A file's tests stay in one process: they share what its fixtures compute.
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 4 --dist loadfile
OTHER_HF := $(abspath build/transformers-$(HF))
# transformers' own tests, by version. The environment has the newest supported transformers.
HF_TESTS := $(abspath build/transformers-tests)
NEWEST_HF = $(shell $(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))')
LM_EVAL := $(abspath build/lm-eval/site-packages)
TRL := $(abspath build/trl/site-packages)
VLLM := $(abspath build/vllm/site-packages)
MKDOCS := $(abspath build/mkdocs/site-packages)

NATIVE_SOURCES := setup.py CMakeLists.txt pyproject.toml $(wildcard build_support/*.py) \
    $(shell find csrc -type f 2>/dev/null)
# What codespell reads; pyproject.toml has its settings.
SPELLED := README.md CONTRIBUTING.md CHANGELOG.md docs csrc fusedkv_ext python_tests scripts benchmarks examples build_support
CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# CMake and Ninja come from the environment, whatever the machine has; build requirements must be there, torch first of all.
export PATH := $(BIN):$(PATH)
export FUSEDKV_CUDA

.PHONY: help build demo test test-fast test-hf test-lm-eval test-trl test-vllm test-real simt sanitize instructions bench performance-doc docs site lint format cuda-objects gpu-bundle floor abi sdist wheel clean distclean

help:
	@echo "make demo          train vanilla, FusedKV-Lite and FusedKV on real text, compare them, write plots (ARGS=--quick)"
	@echo "make test          the test suite (ARGS='-k decode -x')"
	@echo "make test-fast     its most telling tests, in under two minutes on two cores"
	@echo "make test-hf       the tests of Hugging Face models with the oldest transformers (HF=5.17.0), and transformers' own"
	@echo "                   tests of models with the oldest and the newest, which it fetches (140 MB on disk)"
	@echo "make test-lm-eval  the test with EleutherAI's lm_eval, which it fetches (620 MB on disk)"
	@echo "make test-trl      the tests with TRL, which it fetches (270 MB on disk)"
	@echo "make test-vllm     the tests of models served by vLLM on the CPU, which it fetches (1.4 GB on disk)"
	@echo "make test-real     the tests on SmolLM2-135M and real text, which it fetches (110 MB; REAL=build/real keeps them)"
	@echo "make simt          build the CUDA kernels for the host executor; make test does it too"
	@echo "make sanitize      the tests of the CPU ops with AddressSanitizer and UndefinedBehaviorSanitizer (ARGS='-k paged')"
	@echo "make instructions  count what one decode call executes per SIMD target, beside the record (ARGS=--record)"
	@echo "make bench         time everything beside torch and the memory bandwidth of the run, into benchmarks/results"
	@echo "                   (ARGS=--quick: less than 90 s; ARGS='decode --plots DIR'; with ARGS nothing is kept by itself)"
	@echo "make performance-doc  make the tables of docs/performance.md and README.md from benchmarks/results"
	@echo "make docs          that, docs/methods.md from the registry, docs/experiments.md, docs/scale.md from formulas"
	@echo "make site          the documentation with an API reference as a site in build/site, in strict mode; it fetches mkdocs (120 MB on disk)"
	@echo "make lint          ruff and mypy on Python, clang-format on csrc, codespell, sentence lengths and retired words of documents"
	@echo "make format        apply what lint asks for"
	@echo "make cuda-objects  compile every .cu for sm_80 and sm_90a, table of registers and spills (needs nvcc, no GPU)"
	@echo "make gpu-bundle    build for a GPU machine's Python, torch and GPU (sm_90a), into build/gpu-bundle; it fetches that"
	@echo "                   torch (4 GB on disk, once)"
	@echo "make floor         compile the binding layer against the headers of the oldest torch, which it fetches (80 MB, once)"
	@echo "make abi           check that the built libraries use LibTorch's stable ABI only"
	@echo "make build         environment and native build, nothing more"
	@echo "make sdist wheel   packages in dist/"
	@echo "make clean         remove builds; make distclean removes the environment too"

$(DEPS): constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no '$(PYTHON)' here; name an interpreter: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1); Python 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
	    echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu the package python3-venv has it" >&2; exit 1; }
	@echo "installing the pinned packages of constraints.txt into $(VENV) (once; torch is the large one)"
	@$(PIP) install -r constraints.txt
	@touch $@

$(NATIVE): $(DEPS) $(NATIVE_SOURCES)
	@echo "building the native module (incremental after the first time)"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@$(BIN)/fusedkv info | grep '^CUDA ops'
	@touch $@

build: $(NATIVE)

demo: $(NATIVE)
	@$(BIN)/fusedkv demo $(ARGS)

test: $(NATIVE) $(SIMT) $(COUNTER)
	@FUSEDKV_REQUIRE_SIMT=1 FUSEDKV_REQUIRE_COUNTER=1 $(PYTEST) $(ARGS)

# python_tests/fast.py names them.
test-fast: $(NATIVE) $(SIMT) $(COUNTER)
	@FUSEDKV_REQUIRE_SIMT=1 FUSEDKV_REQUIRE_COUNTER=1 $(PYTEST) -m "not slow" $(ARGS)

# Packages in a folder that stands before the environment's own, which stays as it is.
$(OTHER_HF): $(DEPS) constraints-hf.txt
	@echo "installing transformers $(HF) into $@"
	@rm -rf $@ $@.partial && $(PIP) install --no-deps --target $@.partial -r constraints-hf.txt transformers==$(HF) && mv $@.partial $@

# The wheel has no tests. The source package has those of tests/ itself, to which they belong as a package.
$(HF_TESTS)/%: $(DEPS) constraints-hf.txt
	@echo "fetching the tests of transformers $*"
	@rm -rf $@ $@.partial && mkdir -p $@.partial
	@$(PIP) download --no-deps --no-build-isolation --no-binary transformers -d $@.partial transformers==$*
	@tar -xzf $@.partial/transformers-$*.tar.gz -C $@.partial --strip-components=1 transformers-$*/tests
	@rm $@.partial/transformers-$*.tar.gz && touch $@.partial/tests/__init__.py
	@$(PIP) install --no-deps --target $@.partial -c constraints-hf.txt parameterized && mv $@.partial $@

# The folder is named so because dill, which lm_eval pickles with, takes modules from elsewhere for scripts.
$(LM_EVAL): $(DEPS) constraints-lm-eval.txt
	@echo "installing lm_eval and what it needs into $@"
	@rm -rf $@ $@.partial && $(PIP) install --no-deps --target $@.partial -r constraints-lm-eval.txt && mv $@.partial $@

$(TRL): $(DEPS) constraints-trl.txt
	@echo "installing trl and what it needs into $@"
	@rm -rf $@ $@.partial && $(PIP) install --no-deps --target $@.partial -r constraints-trl.txt && mv $@.partial $@

# With the newest transformers transformers' own tests alone: `make test` runs ours with it.
test-hf: $(NATIVE) $(OTHER_HF) $(HF_TESTS)/$(HF)
	@PYTHONPATH=$(OTHER_HF) $(BIN)/python -c 'import transformers; assert transformers.__version__ == "$(HF)"'
	@$(MAKE) --no-print-directory $(HF_TESTS)/$(NEWEST_HF)
	@PYTHONPATH=$(HF_TESTS)/$(NEWEST_HF) $(PYTEST) --dist load python_tests/hf/test_hf_mixins.py $(ARGS)
	@PYTHONPATH=$(OTHER_HF):$(HF_TESTS)/$(HF) $(PYTEST) python_tests/*/test_hf_*.py $(ARGS)

test-lm-eval: $(NATIVE) $(LM_EVAL)
	@PYTHONPATH=$(LM_EVAL) $(BIN)/python -c 'import lm_eval'
	@PYTHONPATH=$(LM_EVAL) $(BIN)/python -m pytest -q python_tests/evaluation/test_hf_lm_eval.py $(ARGS)

test-trl: $(NATIVE) $(TRL)
	@PYTHONPATH=$(TRL) $(BIN)/python -c 'import trl'
	@PYTHONPATH=$(TRL) $(BIN)/python -m pytest -q python_tests/hf/test_hf_trl.py $(ARGS)

# triton is left out: it has no backend for CPUs.
$(VLLM): $(DEPS) constraints-vllm.txt
	@echo "installing vLLM and what it needs into $@"
	@rm -rf $@ $@.partial && $(PIP) install --no-deps --target $@.partial -r constraints-vllm.txt && mv $@.partial $@

test-vllm: $(NATIVE) $(VLLM) $(LM_EVAL)
	@PYTHONPATH=$(VLLM):$(LM_EVAL) FUSEDKV_REQUIRE_VLLM=1 $(PYTEST) python_tests/serving $(ARGS)

$(REAL)/smollm2: $(DEPS)
	@test -e $@ || $(BIN)/python scripts/smollm2.py $@
	@touch $@

$(REAL)/text/bible.txt: $(DEPS)
	@test -e $@ || $(BIN)/python scripts/texts.py $(@D)
	@touch $@

test-real: $(NATIVE) $(REAL)/smollm2 $(REAL)/text/bible.txt
	@FUSEDKV_REAL_WEIGHTS=$(abspath $(REAL)) $(BIN)/python -m pytest -q python_tests/hf/test_real_weights.py $(ARGS)

simt: $(SIMT)

# In a build folder of its own, as no package contains it.
$(SIMT): $(DEPS) $(NATIVE_SOURCES)
	@echo "building the CUDA kernels for the host executor, which runs them in tests"
	@$(BIN)/cmake -S . -B $(@D) -G Ninja --log-level=WARNING -DPython_EXECUTABLE=$(BIN)/python \
	    -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DFUSEDKV_CUDA=OFF -DFUSEDKV_SIMT=ON
	@$(BIN)/cmake --build $(@D) --target _C_simt
	@touch $@

# In a build folder of its own: the library inside fusedkv_ext/ stays as it is.
sanitize: $(DEPS)
	@echo "building the CPU ops with AddressSanitizer and UndefinedBehaviorSanitizer"
	@$(BIN)/cmake -S . -B $(SANITIZE) -G Ninja --log-level=WARNING -DPython_EXECUTABLE=$(BIN)/python \
	    -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DFUSEDKV_CUDA=OFF -DFUSEDKV_SIMT=OFF -DFUSEDKV_SANITIZE=ON
	@$(BIN)/cmake --build $(SANITIZE) --target _C
	@$(BIN)/python scripts/sanitize.py $(SANITIZE) $(SANITIZE_TESTS) $(ARGS)

instructions: $(COUNTER)
	@$(BIN)/python python_tests/instruction_counts.py $(ARGS)

# In the build folder of the module (setup.py), where the kernels are compiled already.
$(COUNTER): $(NATIVE) scripts/count_instructions.cpp
	@folder=$$($(BIN)/python -c \
	    'import sys, sysconfig; print(f"build/cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")'); \
	    $(BIN)/cmake --build "$$folder" --target count_instructions; cp "$$folder/count_instructions" $@

bench: $(NATIVE)
	@$(BIN)/python benchmarks/cpu.py $(if $(ARGS),$(ARGS),--json 'benchmarks/results/cpu_{threads}threads.json')

performance-doc: $(NATIVE)
	@PYTHONPATH=benchmarks $(BIN)/python -m suite.tables .

docs: performance-doc
	@$(BIN)/python -m fusedkv_ext.lab.pages.methods .
	@$(BIN)/python -m fusedkv_ext.lab.pages.experiments .
	@$(BIN)/python -m fusedkv_ext.lab.pages.planner .

$(MKDOCS): $(DEPS) constraints-docs.txt
	@echo "installing mkdocs and its dependencies into $@"
	@rm -rf $@ $@.partial && $(PIP) install --no-deps --target $@.partial -r constraints-docs.txt && mv $@.partial $@

# Not with --quiet, which hides warnings from strict mode. The variable hides an advertisement.
site: $(MKDOCS)
	@PYTHONPATH=$(MKDOCS) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site: build/site/index.html"

lint: $(DEPS)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	@$(BIN)/codespell $(SPELLED)
	@$(BIN)/python scripts/prose_check.py
	@echo "lint: clean"

format: $(DEPS)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP_FILES)

# A build folder of its own, so that the architectures do not depend on what the module was configured for. The launcher
# keeps what ptxas says of each kernel. A library is linked too, where torch has no CUDA against a stand-in for it.
cuda-objects: $(DEPS)
	@if [ "$(FUSEDKV_CUDA)" = 0 ]; then echo "cuda-objects: skipped, FUSEDKV_CUDA=0 turns CUDA off"; \
	elif ! nvcc=$$($(BIN)/python build_support/native_config.py nvcc); then exit 1; \
	elif [ -z "$$nvcc" ]; then echo "cuda-objects: skipped, no nvcc on this machine"; \
	else \
	    TORCH_CUDA_ARCH_LIST="$(CUDA_OBJECTS_ARCHS)" $(BIN)/cmake -S . -B $(CUDA_OBJECTS) -G Ninja --log-level=WARNING \
	        -DPython_EXECUTABLE=$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DFUSEDKV_CUDA=ON -DFUSEDKV_SIMT=OFF \
	        "-DCMAKE_CUDA_COMPILER_LAUNCHER=$(BIN)/python;$(CURDIR)/scripts/ptxas_report.py;compile" && \
	    $(BIN)/cmake --build $(CUDA_OBJECTS) --target cuda-objects && \
	    $(BIN)/python scripts/ptxas_report.py report $(CUDA_OBJECTS) && \
	    $(BIN)/cmake --build $(CUDA_OBJECTS) --target _C_cuda && \
	    echo "cuda-objects: every .cu compiled for $(CUDA_OBJECTS_ARCHS) in $$SECONDS s"; \
	fi

# Elsewhere than .venv, whose Python and torch are others. Import needs all of torch's CUDA packages, a build would not.
$(BUNDLE_VENV)/torch-$(BUNDLE_TORCH).stamp: constraints.txt
	@command -v "$(BUNDLE_PYTHON)" >/dev/null || { echo "error: no '$(BUNDLE_PYTHON)' here; name the GPU machine's Python: make gpu-bundle BUNDLE_PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing torch $(BUNDLE_TORCH) with CUDA into $(BUNDLE_VENV) (once)"
	@"$(BUNDLE_PYTHON)" -m venv "$(BUNDLE_VENV)"
	@"$(BUNDLE_VENV)/bin/python" -m pip --disable-pip-version-check -qq install "torch==$(BUNDLE_TORCH)" \
	    $$(grep -E '^(pybind11|cmake|ninja)==' constraints.txt)
	@touch $@

# scripts/gpu_check.sh takes the libraries from there. Only they are in the folder, so that all of it can be carried.
gpu-bundle: $(BUNDLE_VENV)/torch-$(BUNDLE_TORCH).stamp
	@bin=$(abspath $(BUNDLE_VENV))/bin; export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-9.0a}"; \
	    "$$bin/cmake" -S . -B $(BUNDLE)-cmake -G Ninja --log-level=WARNING "-DPython_EXECUTABLE=$$bin/python" \
	        "-DCMAKE_MAKE_PROGRAM=$$bin/ninja" -DFUSEDKV_CUDA=ON -DFUSEDKV_SIMT=OFF; \
	    "$$bin/cmake" --build $(BUNDLE)-cmake $(if $(MAX_JOBS),--parallel $(MAX_JOBS)) --target _C _C_cuda; \
	    rm -rf $(BUNDLE); "$$bin/cmake" --install $(BUNDLE)-cmake --prefix $(BUNDLE) >/dev/null; \
	    FUSEDKV_NATIVE_DIR=$(abspath $(BUNDLE)) "$$bin/python" scripts/load_native.py; \
	    du -b $(BUNDLE)/*; echo "gpu-bundle: built in $$SECONDS s; carry $(BUNDLE) with the sources and run scripts/gpu_check.sh"

floor: $(DEPS)
	@$(BIN)/python scripts/floor_check.py

abi: $(NATIVE)
	@scripts/abi_check.sh $(BIN)

sdist: $(DEPS)
	@$(BIN)/python -c 'from setuptools import build_meta; print("dist/" + build_meta.build_sdist("dist"))' | tail -n 1

wheel: $(DEPS)
	@$(PIP) wheel --no-build-isolation --no-deps -w dist .
	@wheel=$$(ls -t dist/*.whl | head -n 1); size=$$(stat -c %s "$$wheel"); \
	    echo "$$wheel: $$((size / 1000)) kB, may be $(WHEEL_MAX_KB) kB"; \
	    [ $$size -le $$(($(WHEEL_MAX_KB) * 1000)) ] || { echo "error: the wheel is too large" >&2; exit 1; }

clean:
	@rm -rf build dist *.egg-info fusedkv_ext/*.so $(NATIVE) .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf "$(VENV)"
