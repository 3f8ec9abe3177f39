# make quickstart   train a Switch Transformer beside its dense twin (minutes on two cores)
# make test         run the tests
# make lint         style, types, and the direction of imports
# make notebook     run the notebooks from a clean kernel and check that their .py twins say the same
# make results      write experiments/RESULTS.md from experiments/summaries/
# make clean        remove what builds and test runs leave behind (runs/ and environments stay)
#
# Each makes a virtual environment, installs what it needs, and is quick the second time. Settings:
#   PYTHON=python3.13   another interpreter; it gets an environment of its own, .venv-3.13
#   VENV=DIR            another place for the environment
#   EXTRAS=gpu          more extras of setup.cfg on top of the target's own, separated by commas
#   ARGS='...'          more arguments for the command that runs in the end
#   JOBS=4              how many test processes run at once (two by default)

PYTHON ?= python3
VENV ?= auto
EXTRAS ?=
ARGS ?=
JOBS ?= 2

comma := ,
# In a recipe: set the shell's $$venv to the environment's folder, with these extras installed, or stop.
with = set -e; venv=$$(.ci/venv.sh '$(PYTHON)' '$(VENV)' '$(1)$(if $(EXTRAS),$(comma)$(EXTRAS))')

.PHONY: quickstart test lint notebook results clean help
.DEFAULT_GOAL := help

# jax for CUDA too where an NVIDIA driver answers, so that a GPU that is there is used.
quickstart: gpu = $(shell nvidia-smi -L >/dev/null 2>&1 && echo ,gpu)
quickstart:
	@$(call with,train$(comma)report$(gpu)); "$$venv/bin/python" experiments/quickstart.py $(ARGS)

test:
	@$(call with,train$(comma)report$(comma)tensorboard$(comma)test); \
	"$$venv/bin/python" -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint:
	@$(call with,train$(comma)report$(comma)tensorboard$(comma)test$(comma)dev); bin=$$venv/bin; status=0; \
	echo "ruff check:";   "$$bin/ruff" check . || status=1; \
	echo "ruff format:";  "$$bin/ruff" format --check . || status=1; \
	echo "pyright:";      "$$bin/pyright" --pythonpath "$$bin/python" || status=1; \
	echo "lint-imports:"; "$$bin/lint-imports" || status=1; \
	exit $$status

notebook:
	@$(call with,train$(comma)report$(comma)tensorboard$(comma)test$(comma)dev); \
	"$$venv/bin/python" .ci/notebook.py $(ARGS)

results:
	@$(call with,train$(comma)report); "$$venv/bin/python" experiments/results.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
