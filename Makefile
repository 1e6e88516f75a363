VENV ?= .venv
PY := $(VENV)/bin/python
PYTEST_ARGS ?= -n 2

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q --upgrade 'pip>=25.1'
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e . --group dev
	$(PY) -m pip install -q --no-deps rapidocr-onnxruntime==1.4.4 silero-vad==6.2.3  # models for tests; their own dependencies would replace onnxruntime-gpu and torch
	touch $@

setup: $(VENV)/.ready ## make .venv with the project and its tools

demo: setup ## prune a real network with proof, then a whole run: train, prune, distil, strip, bench
	mkdir -p demo
	$(VENV)/bin/onnxslim-kd export mobilenet_v2 -o demo/mobilenet_v2.onnx --force
	$(VENV)/bin/onnxslim-kd prune demo/mobilenet_v2.onnx --pattern '.*[r|d]_weights' --ratio 0.5 -o demo/pruned.onnx --force
	$(VENV)/bin/onnxslim-kd run examples/digits.yaml --dir demo/digits

lint: setup ## ruff and mypy
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy benchmarks/*.py

test: lint ## everything that must hold before a change lands: linters, types, tests
	$(PY) -m pytest $(PYTEST_ARGS)
	tests/oracle_check.sh

coverage: setup ## the tests, and which lines they reach
	$(PY) -m pytest $(PYTEST_ARGS) --cov --cov-report=term:skip-covered

docs: setup ## write docs/api.md from the docstrings
	$(PY) docs/make_api.py

check: test ## the same

bench: setup ## every benchmark, then the tables of their results (hours)
	$(PY) -m pip install -q --no-deps -r benchmarks/requirements.txt
	$(PY) -m pip install -q -c constraints.txt matplotlib
	for script in prune_speed merge_cost strip train_step latency_pruning; do $(PY) benchmarks/$$script.py || exit 1; done
	$(PY) benchmarks/table.py
	$(PY) benchmarks/picture.py

slow: setup ## the long tests
	$(PY) -m pytest -m slow

.PHONY: help setup demo lint test coverage docs check slow bench
