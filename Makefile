# make demo | make demo-full | make test | make check | make chaos | make lmms: each sets up .venv
# first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := 2.13.0

.PHONY: demo demo-full test test-ray check chaos lmms setup clean

setup: $(READY)

# Dependencies are pinned in constraints.txt. Without an NVIDIA GPU torch's CPU build is taken,
# which is 20 times smaller.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  f"Python {sys.version.split()[0]} is too old: make PYTHON=python3.11 (or newer)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	@if command -v nvidia-smi >/dev/null; then \
	  $(BIN)/pip install --quiet torch==$(TORCH); \
	else \
	  $(BIN)/pip install --quiet --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu \
	    torch==$(TORCH)+cpu 2>/dev/null || $(BIN)/pip install --quiet torch==$(TORCH); \
	fi
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

# A real-time model on the toy world: trained, evaluated, watching a clip, on a page. What is
# finished is not done again.
demo: $(READY)
	@$(BIN)/python -m tools.demo

# The same through all four stages, from random weights.
demo-full: $(READY)
	@$(BIN)/python -m tools.demo --full

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# An import on a Ray of two nodes, whose worker and node are killed.
test-ray: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[ray]'
	TEST_RAY=1 $(BIN)/python -m pytest tests/data_pipeline/engines/test_ray.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_sizes.py

# A hundred faults by a seed, and the losses of a run in peace (docs/reliability.md): up to an hour.
chaos: $(READY)
	$(BIN)/python -m tools.chaos --faults 100

# lmms-eval's own environment, once (2.0 GB), and the test that asks our server through it.
lmms: $(READY)
	$(BIN)/python -m tools.evaluate.lmms_environment
	$(BIN)/python -m pytest tests/tools/evaluate/test_lmms.py tests/tools/evaluate/test_lmms_scores.py

clean:
	rm -rf $(VENV) toy_world runs
