# Everything sets up .venv by itself when it is missing or its lock changed.
PROFILE ?= quick
DATA_ROOT ?=
SET ?=
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin
# What the runner gives its kernels (ENVIRONMENT in lib/study.py says why), for tests and JupyterLab too.
export GOMP_SPINCOUNT ?= 10000
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

.PHONY: reports test lab demo latency data lint format lock clean

reports: .venv/ready  ## run what changed of the study and publish reports/<run>/
	$(BIN)/python -m lib.study $(PROFILE) $(if $(DATA_ROOT),--data-root "$(DATA_ROOT)") $(foreach pair,$(SET),--set $(pair))

test: .venv/ready  ## every test, the notebooks under nbval included
	$(BIN)/python -m pytest

lab: .venv/ready  ## JupyterLab on the notebooks; ARGS goes to jupyter: make lab ARGS='--port 9999'
	$(if $(filter --allow-root%,$(ARGS)),,@test "$$(id -u)" != 0 || \
		echo "You are root, as in most containers, and JupyterLab asks to be told so: make lab ARGS=--allow-root" >&2)
	$(BIN)/jupyter lab --notebook-dir=notebooks --LabApp.default_url=/lab/tree/00_welcome.ipynb $(ARGS)

# Voila answers any host name, so that a page from elsewhere could reach it under a name of its own (DNS rebinding): an empty value
# says no. Whoever serves others adds ARGS='--Voila.ip=0.0.0.0 --Voila.tornado_settings=allow_remote_access=1'.
demo: .venv/ready  ## the explorer as one web page, without code, on this machine; ARGS goes to Voila
	$(BIN)/voila notebooks/00_welcome.ipynb --Voila.tornado_settings=allow_remote_access= $(ARGS)

latency: .venv/ready  ## how fast the explorer answers, into reports/explorer.json; needs Chromium and an idle machine
	$(BIN)/python tests/bench_explorer.py

data: .venv/ready  ## download BreaKHis (4 GB) into data/, or go on with it, and count it
	$(BIN)/python -m lib.database

lint: .venv/ready  ## what must hold before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: pyproject.toml  ## renew requirements.txt for all platforms; needs uv
	uv pip compile --universal --quiet --no-header --no-annotate pyproject.toml -o requirements.txt

clean:  ## remove the environment and all runs; reports stay
	rm -rf .venv runs

# With uv where it is there, with pip otherwise. The last line marks a complete set-up.
.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11 to 3.13 is needed; name it with PYTHON=python3.12"; exit 1; }
	@if command -v uv >/dev/null; then \
		uv venv --clear --python "$(PYTHON)" .venv && VIRTUAL_ENV=.venv uv pip install --compile-bytecode -r requirements.txt -e .; \
	else \
		$(PYTHON) -m venv --clear .venv && $(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -e .; \
	fi
	@touch $@
