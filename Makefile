# make demo, make examples: see it work. make test: the checks. All need Python 3.10 or newer and a C++ compiler, nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
JOBS   ?= 2
SWEEP  := build/sweep.json
RECIPE ?= prelude

.PHONY: demo examples test test-long test-torch lint bench sweep clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# Each chain of plain PyTorch on the CPU: found, fused, equal, ratio of times.
examples: $(READY)
	for chain in $$(grep -l "^CHAIN = " examples/*.py); do \
		OMP_NUM_THREADS=1 $(BIN)/python $$chain --device cpu && echo || exit 1; \
	done

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not long"

# torchao is not in CI's environment: transformers imports it wherever it is installed.
test-long: $(READY)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e ".[hf,dev,quantised]"
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# As test, with another torch: make test-torch TORCH=2.15.0
test-torch:
	$(PYTHON) -m venv .venv-$(TORCH)
	grep -v "^torch==\|^triton==" constraints.txt > .venv-$(TORCH)/constraints.txt
	.venv-$(TORCH)/bin/pip install --quiet --no-compile -c .venv-$(TORCH)/constraints.txt "torch==$(TORCH)" -e ".[hf,dev]"
	.venv-$(TORCH)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not long"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# prelude, projection, input_norm, diffusion, rope_store, packed, mrope, qk_norm, add_norm, grouped_heads or e2e.
bench: $(READY)
	$(BIN)/fxfuse bench $(RECIPE)

# Every rotary model of transformers and diffusers; an hour. What $(SWEEP) holds is not run again.
sweep: $(READY)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e ".[hf,dev,sweep]"
	OMP_NUM_THREADS=1 $(BIN)/fxfuse sweep --library all --all-scenarios \
		--jobs $(JOBS) --out $(SWEEP) --document docs/coverage.md

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e ".[hf,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
