# `make demo` and `make test` each set up what they need. PYTHON names the interpreter the environment is made from.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Modules are compiled once and kept, whatever the caller's environment says: workers start many processes.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test suite parity lint types clean

demo: $(VENV)/ready
	$(BIN)/thresher demo

# A type checker that starts from nothing takes a minute of one core: the suite need not wait for it.
test: lint
	$(MAKE) --jobs=2 types suite

# One worker per core, each with one thread: tests of small tensors gain nothing from more. A worker without tests takes
# some of another's: the slowest ones come last.
suite: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# Other packages' own classes on what we export (tests/parity/). The first time, up to an hour of installing, 11 GB in .parity/.
parity: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m parity tests/parity
	$(BIN)/python -m tests.parity.page

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A type checker needs to see the root under its installed name; the link gives it that.
types: $(VENV)/ready
	MYPYPATH=$(VENV)/typing $(BIN)/mypy -p thresher.cache -p thresher.harvest -p thresher.train -p thresher.evaluate -p thresher.interop -p thresher.recipes -p thresher.sharing -p thresher.toy -p thresher.commands -m thresher.cli

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores; some packages hold files of other Pythons
	mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/thresher
	touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .ruff_cache .mypy_cache
