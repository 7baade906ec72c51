# `make demo` and `make test` are all a fresh machine needs; both install into .venv first.
PY := .venv/bin/python
# A CUDA build where there is an NVIDIA driver, else the pinned build, which is found as a CPU wheel where one is offered.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)

.PHONY: demo test lint bench clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(PY) -m accelplug demo --report demo.html

test: .venv/installed
	$(PY) -m pytest -n auto --dist worksteal

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/installed
	$(PY) -m benchmarks.demo_pareto

clean:
	rm -rf .venv build dist *.egg-info demo.html
