# The README's two commands are `make demo` and `make test`. Both set everything up first; the rest stands beside them.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Test files at once: much of a run on real parts is waiting for processes to start.
WORKERS := 2
# replay_queue and not queue: a script's folder comes first on its path, and torch and ray import the standard queue.
# In this order; each says by --help what it measures and what it is to reach.
BENCHMARKS := startup generator learner weights replay_queue overlap sync_vs_async peers soak plan scaling bias learning chaos gpu

.PHONY: demo test setup lint bench clean

demo: setup            ## Train a small policy asynchronously, on the real vLLM, DeepSpeed and Ray
	$(PY) -m async_rlhf train conf/quickstart.yaml $(ARGS)

test: setup            ## All tests; `make test ARGS="-m 'not slow'"` for the quick ones, WORKERS=1 where memory is short
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: setup            ## Format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

bench: setup           ## Everything that is timed, or takes long (some hours); `make bench ARGS=--quick` for a look, BENCHMARKS="replay_queue" for one
	@missed=""; for name in $(BENCHMARKS); do \
	  echo "== benchmarks/$$name.py $(ARGS)"; $(PY) benchmarks/$$name.py $(ARGS) || missed="$$missed $$name"; \
	done; $(PY) -m pytest -m long || missed="$$missed pytest"; \
	if [ -n "$$missed" ]; then echo "failed:$$missed" >&2; exit 1; fi

setup: $(STAMP)        ## The virtual environment with everything in it

$(STAMP): pyproject.toml .ci/install
	bash .ci/install $(VENV)
	touch $@

clean:
	rm -rf $(VENV) runs
