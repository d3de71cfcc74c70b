# The README's two commands are `make demo` and `make test`. Both set everything up first; the rest stands beside them.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test setup lint bench clean

demo: setup            ## Train a small policy asynchronously, on the real vLLM, DeepSpeed and Ray
	$(PY) -m async_rlhf train conf/quickstart.yaml $(ARGS)

test: setup            ## All tests; `make test ARGS="-m 'not slow'"` for the quick ones
	$(PY) -m pytest -n 2 tests/unit $(ARGS)
	$(PY) -m pytest --ignore=tests/unit $(ARGS)

lint: setup            ## Format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

bench: setup           ## Everything that is timed, or takes long (about an hour and a half)
	$(PY) benchmarks/startup.py
	$(PY) benchmarks/bias.py
	$(PY) benchmarks/learning.py
	$(PY) benchmarks/chaos.py
	$(PY) benchmarks/plan.py
	$(PY) benchmarks/scaling.py
	$(PY) -m pytest -m long

setup: $(STAMP)        ## The virtual environment with everything in it

$(STAMP): pyproject.toml .ci/install
	bash .ci/install $(VENV)
	touch $@

clean:
	rm -rf $(VENV) runs
