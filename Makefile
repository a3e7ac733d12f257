PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo

.PHONY: setup demo scenes sana15 notebooks test slow check lint lock clean

setup: $(STAMP)  ## make .venv with exactly what requirements.lock names

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "SANA Lab needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## train the tiny recipe, judge it, draw, and write a report
	@$(BIN)/python scripts/demo.py

scenes: setup  ## train the base model of the scenes anew, twice, and judge it (two hours on two CPU cores)
	@PYTHON=$(BIN)/python bash experiments/scenes/run.sh

sana15: setup  ## grow, prune and choose among small networks, three seeds (75 minutes on two CPU cores)
	@PYTHON=$(BIN)/python bash experiments/sana15_scenes/run.sh

notebooks: setup  ## execute notebooks/ on small runs that they train themselves
	@$(BIN)/python scripts/run_notebooks.py

test: setup  ## every test that fits on two CPU cores
	$(BIN)/python -m pytest -q -n 2 --durations=10 -m "not full_size and not long"

slow: setup  ## tests of minutes: of several processes, and, one after the other, at published sizes (8 GiB)
	$(BIN)/python -m pytest -q -n 2 --dist loadscope --durations=10 -m "long and not full_size"
	$(BIN)/python -m pytest -q --durations=0 -m full_size

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

check: lint  ## what green means: lint, types, import contracts, fast tests
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not long"

lock:  ## resolve requirements.lock anew
	@test -x $(BIN)/uv || ($(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv)
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --custom-compile-command "make lock" --quiet --output-file requirements.lock

clean:  ## remove the environment and caches; runs and experiments stay
	rm -rf $(VENV) .pytest_cache .ruff_cache cache
