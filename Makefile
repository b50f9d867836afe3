# make study   sets up .venv and runs the embedded phantom study      make test   sets up .venv and runs every test
# make quick   the tests that take no more than seconds each          make docs   renders the site with Quarto
# make lab     opens the notebooks                                    make lock   resolves requirements.in again
# make notebooks    runs every notebook, or NB="05_train ...", and saves the outputs
# make fuzz        films, tables, configurations and predictions changed at random, for ten minutes
# make test-latest  the same tests with the newest release of each dependency within the bounds of settings.ini
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
CONFIG ?= configs/phantom.yaml
UV := uv==0.13.9
export PIP_DISABLE_PIP_VERSION_CHECK = 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: study test quick fuzz test-latest docs lab notebooks lock lock-check clean

study: .venv/ready
	$(BIN)/cxrlg_study $(CONFIG)

test: .venv/ready
	@CXRLG_BIN=$(BIN) tests/run_all

quick: .venv/ready
	$(BIN)/python -m pytest -q -n 2 -m "not slow" tests

fuzz: .venv/ready
	$(BIN)/python -W ignore tests/fuzz.py 600

test-latest:
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install -q $(UV)
	.venv-latest/bin/uv pip install -q --python .venv-latest/bin/python --compile-bytecode setuptools wheel
	.venv-latest/bin/uv pip install -q --python .venv-latest/bin/python --compile-bytecode --upgrade --no-build-isolation -e ".[dev]"
	.venv-latest/bin/uv pip freeze --python .venv-latest/bin/python | grep -iE "^(torch|torchvision|timm|fastai|numpy|pandas|scipy|scikit-learn|papermill|nbdev)=="
	@CXRLG_BIN=.venv-latest/bin tests/run_all

docs: .venv/ready
	@command -v quarto >/dev/null || { echo "make docs needs Quarto 1.8 or later on the PATH: https://quarto.org/docs/get-started/"; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs

lab: .venv/ready
	$(BIN)/jupyter lab nbs

notebooks: .venv/ready
	$(BIN)/python tests/run_notebooks.py $(NB)

lock:
	$(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install -q $(UV)
	echo "# Every package at one version, for Linux x86-64 and macOS arm64, Python 3.11, 3.12 and 3.13; \`make lock\` makes it from requirements.in." > requirements.lock
	.venv-lock/bin/uv pip compile -q --universal --python-version 3.11 --annotation-style line --no-header requirements.in >> requirements.lock
	rm -rf .venv-lock

lock-check: .venv/ready
	$(BIN)/python tests/check_lock.py

.venv/ready: requirements.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12), (3, 13)})' || { echo "cxrlg needs Python 3.11, 3.12 or 3.13; found $$($(PYTHON) -V): say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(UV)
	$(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv .venv-latest _proc _docs build cxrlg.egg-info
