# Everything sets itself up: `make serve` and `make test` work from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

ifeq ($(shell command -v "$(PYTHON)"),)
ifneq ($(origin PYTHON),file)
$(error there is no program '$(PYTHON)'; give a Python 3.11 or newer, as in: make PYTHON=python3.12 ...)
endif
endif

COMPILED := env -u PYTHONDONTWRITEBYTECODE
INSTALL := pyproject.toml setup.py constraints.txt scripts/install.sh

.PHONY: serve test types bench lint clean
.DELETE_ON_ERROR:

serve: .venv/.installed  ## serve the embedded model on 127.0.0.1:8000 (ARGS="--port 9000")
	@exec $(BIN)/minserve serve $(ARGS)

test: .venv/.installed-test  ## check style and types, run the test suite (ARGS="-k pool", ARGS="-n 0 --pdb")
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# Beside the types' check, on one core, the tests are compiled on another. Compiled files are
	@# kept whatever the environment says: else every process of a test compiles all it imports.
	@# It ends with the check, also if that fails or is interrupted.
	@$(COMPILED) $(BIN)/python -m pytest --collect-only >/dev/null 2>&1 & \
	trap "kill $$! 2>/dev/null" EXIT; trap "exit 130" INT TERM; \
	scripts/typecheck.sh && wait
	@# A worker for each core, so that none needs more than one thread. They begin with the files
	@# that take longest, see tests/conftest.py.
	$(COMPILED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 \
		--dist loadfile --no-loadscope-reorder $(ARGS)

types: .venv/.installed-test  ## check the types
	scripts/typecheck.sh

bench: .venv/.installed-test  ## parity with transformers, then offline speed
	$(BIN)/python bench/parity.py
	$(BIN)/python bench/offline.py

lint: .venv/.installed-test  ## format and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.installed: $(INSTALL)
	@PYTHON=$(PYTHON) scripts/install.sh
	@touch $@

.venv/.installed-test: $(INSTALL)
	@PYTHON=$(PYTHON) scripts/install.sh test
	@touch .venv/.installed $@

clean:  ## remove the environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
