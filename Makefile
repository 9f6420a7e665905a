# make demo    train an agent with EPO on the embedded game and show what it learned (runs/quickstart/)
# make test    the test suite
# make check   ruff, types, and that imports only go down
# make docs    the documentation as a site: site/index.html
# make notebook  the notebook of the demo, executed whole: runs/epo_quickstart.ipynb
# Each makes its own virtual environment in .venv first. PYTHON=python3.12 chooses another Python (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# On a machine without a GPU `make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu` spares gigabytes.
TORCH_INDEX ?=

.PHONY: demo test check docs notebook clean

demo: $(VENV)/installed
	$(BIN)/python examples/quickstart.py --output_dir runs/quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Strict: a broken link, anchor or name is an error.
docs: $(VENV)/installed
	$(BIN)/zensical build --strict --clean

notebook: $(VENV)/installed
	mkdir -p runs
	$(BIN)/papermill examples/notebooks/epo_quickstart.ipynb runs/epo_quickstart.ipynb

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
