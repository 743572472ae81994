# The verbs of the project. Every one of them sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: run test test-recipes test-gpu cuda lint clean bench sanitize older-cuda build wheel test-previous

run: build
	$(PY) -m fusedmm run

# All ops beside all peers, or OP=bi_attention. ARGS goes to benchmarks.run (python -m benchmarks.run
# --help). What is timed, the profile (which needs perf) too, comes before what is not.
OP ?= all
BENCH = $(PY) -m benchmarks.run $(OP)
bench: build
	$(PY) -m pip install -q -e ".[bench]" --no-build-isolation
	$(BENCH) --cases model,overhead --what time $(ARGS)
	$(BENCH) --cases sweep --what time --modes fwdbwd --dtypes fp32 $(ARGS)
	if command -v perf > /dev/null; then $(PY) -m benchmarks.profile; fi
	$(BENCH) --cases model --what memory --modes fwdbwd $(ARGS)
	$(BENCH) --cases sweep --what memory --modes fwdbwd --dtypes fp32 $(ARGS)
	$(PY) -m benchmarks.report

test: lint
	$(PY) -m pytest -q -n 2 -m "not gpu and not recipe"

# Every recipe, shortened, against chance. Takes a quarter of an hour.
test-recipes: build
	$(PY) -m pytest -q -m recipe tests/test_recipes.py $(ARGS)

# GPU tests: on a real GPU if there is one, else on the virtual one, as sm_80 and as sm_90. Without
# GPU_TESTS= they are the simulator's own, those of the GPU kernels, and of the suites all on the
# compiled kernels and of Triton's what the others do not try: each of its cases is compiled anew.
# GPU_TESTS=tests is all there are, which takes far longer on the virtual GPU.
SUITES := $(foreach op,bi_attention co_attention contrastive_loss sigmoid_loss,tests/test_$(op).py)
TRITON_TOO := test_gpu or test_vgpu or inductor or autocast or far_apart or rows_in_one_pass
GPU_TESTS ?= tests/vgpu tests/test_gpu.py tests/test_cuda_launch.py $(SUITES) \
	-k "not triton or $(TRITON_TOO)"
test-gpu: build cuda
	PYTHONPATH=tests $(PY) -m vgpu test $(ARGS) -- $(GPU_TESTS)

# Parity with the originals in the newest release of Transformers' previous major line.
test-previous: build
	$(PY) -m pip install -q --upgrade --target $(VENV)/previous "transformers<5"
	PYTHONPATH=$(VENV)/previous $(PY) -m pytest -q tests/test_nn_originals.py tests/test_patch.py \
		tests/test_examples.py

# A wheel and an sdist in dist/, each installed into an empty venv and used there. Takes minutes.
wheel: build
	$(PY) tests/make_wheel.py $(ARGS)

# The CUDA kernels beside the rest where there is an nvcc, for this GPU or as PTX for the virtual one.
cuda: build
	@if command -v nvcc > /dev/null; then \
	  export FUSEDMM_CUDA=1; \
	  $(PY) -c "import sys, torch; sys.exit(torch.cuda.is_available())" && \
	    export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0+PTX 9.0a+PTX}"; \
	  $(PY) setup.py -q build_ext --inplace; \
	else echo "no nvcc: the CUDA kernels are not built and not tested"; fi

# The CUDA kernels by the compiler of CUDA 12.6, whatever nvcc is installed; takes minutes.
older-cuda: build
	$(PY) tests/cpp/older_cuda.py $(ARGS)

# ASan and UBSan on the CPU kernels, for each instruction set of this machine.
sanitize:
	$(PYTHON) tests/cpp/sanitize.py

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

build: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: setup.py builds the extension against it.
$(VENV)/.deps: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install -q --upgrade "setuptools>=77" wheel
	$(PY) -m pip install -q "torch>=2.9" numpy ninja pybind11
	touch $@

$(STAMP): $(VENV)/.deps setup.py $(shell git ls-files csrc 2>/dev/null)
	$(PY) -m pip install -q --no-build-isolation -e ".[train,recipes,test,lint]"
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks fusedmm/_build_info.py
	find . -name '*.so' -not -path './$(VENV)/*' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
