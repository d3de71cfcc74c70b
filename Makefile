# The README's two commands are `make demo` and `make test`. Both set everything up first; the rest stands beside them.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Test files at once: much of a run on real parts is waiting for processes to start.
WORKERS := 2

.PHONY: demo test setup lint bench clean

demo: setup            ## Train a small policy asynchronously, on the real vLLM, DeepSpeed and Ray
	$(PY) -m async_rlhf train conf/quickstart.yaml $(ARGS)

test: setup            ## All tests; `make test ARGS="-m 'not slow'"` for the quick ones, WORKERS=1 where memory is short
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

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
