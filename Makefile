# Needs only Python (3.10 or newer, with venv) and make. Every target sets up what it needs in .venv first.
#   make demo         from nothing to a fixed model and its report
#   make test         the whole test suite
#   make lint         ruff and pyright
#   make docs         the documentation as a site, links checked
#   make bench        the short form of every benchmark (build/benchmarks/), and docs/benchmarks.md from the committed results
#   make test-oldest  conformance and unit tests on the oldest supported transformers
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
BENCHMARKS := where_to_edit edit_speed trace_overhead head_effects creme creme_speed creme_real mt_editing copra copra_speed shapley merge_memory duquant duquant_lab duquant_speed fuzz_patch kill_resume
QUICK := build/benchmarks
# tests: no network, and one thread per worker, since two workers share the machine
TESTING := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TROCAR_PROGRESS=0

.PHONY: help demo test test-oldest conformance-oldest lint format bench docs pins clean
help:
	@sed -n 's/^#   //p' Makefile

# two stamps in one environment: the core for the demo, the development tools for everything else
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Trocar needs Python 3.10 or newer; choose one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(OLDEST)/.dev: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.core
	$(BIN)/trocar demo

test: $(VENV)/.dev
	$(TESTING) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15

test-oldest: $(OLDEST)/.dev
	$(TESTING) $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/unit tests/conformance

conformance-oldest: $(OLDEST)/.dev
	$(TESTING) $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/conformance

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the committed results are those of the full forms; the quick ones go to a page of their own. A benchmark that cannot run (no data) does not
# keep the others from running, but fails the target
bench: $(VENV)/.dev
	@mkdir -p $(QUICK); failed=""; for name in $(BENCHMARKS); do echo "== $$name"; \
		$(BIN)/python benchmarks/$$name.py --quick --out $(QUICK)/$$name.json || failed="$$failed $$name"; done; \
	echo "== support_table"; $(BIN)/python benchmarks/support_table.py || failed="$$failed support_table"; \
	$(BIN)/python benchmarks/render.py --results $(QUICK) --out $(QUICK)/benchmarks.md && $(BIN)/python benchmarks/render.py || failed="$$failed render"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pins: $(VENV)/.dev $(OLDEST)/.dev
	$(BIN)/python tools/pins.py > constraints.txt
	$(OLDEST)/bin/python tools/pins.py > constraints-oldest.txt

clean:
	rm -rf $(VENV) $(OLDEST) site .pytest_cache .ruff_cache
