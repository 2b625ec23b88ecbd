# Two commands for everyone: `make quickstart` and `make test`. Both set up .venv themselves, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# What runs at both ends of the versions that pyproject.toml allows. TORCH=2.13.0 takes that version of torch at either end.
QUICK := tests/test_house.py tests/host tests/clt tests/data tests/eval tests/graphs tests/attribution tests/bundles tests/features/test_clusters.py tests/training/test_run.py
TORCH ?=

.PHONY: quickstart test check install docs constraints test-lowest test-latest clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "crosslayer needs Python 3.11 or newer; set PYTHON=python3.12, say"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --group dev
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --group docs
	touch $@

install: $(VENV)/.installed-dev

quickstart: $(VENV)/.installed
	$(BIN)/crosslayer quickstart $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/lint-imports
	$(BIN)/pyright

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Names and versions of what is installed in .venv now, for the next `make`.
constraints: $(VENV)/.installed-dev $(VENV)/.installed-docs
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' | sed 's/+cpu$$//' > constraints.txt

test-lowest: $(VENV)/.installed-dev
	$(BIN)/python scripts/at_versions.py lowest --torch "$(TORCH)" -- $(QUICK)

test-latest: $(VENV)/.installed-dev
	$(BIN)/python scripts/at_versions.py latest --torch "$(TORCH)" -- $(QUICK)

clean:
	rm -rf $(VENV) .venv-lowest .venv-latest build dist site
