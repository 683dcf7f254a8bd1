# Two commands are enough: `make demo` trains the demo model, `make test` runs the tests. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
QUICK ?=

.PHONY: demo test check format bench docs venv clean

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
	for name in packing training; do \
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

clean:  ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
