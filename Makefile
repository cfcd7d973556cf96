# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv and install into it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_STEPS ?= 12000
PARALLEL ?= --numprocesses logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint copy types package bench clean

help:
	@echo "make demo       train SAC on HalfCheetah-v5 for about two minutes and draw its learning curve"
	@echo "make test       lint, type check and test (about ten minutes on two cores)"
	@echo "make test-slow  the tests marked slow: learning, and fifty kills"
	@echo "make lint types package   the checks alone"
	@echo "make bench      the benchmarks against Stable-Baselines3 (hours; see benchmarks/README.md)"

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlkit needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing rlkit and what it needs into $(VENV) (a few minutes, once)"
	$(PIP) -e '.[dev]'
	@touch $@

install: $(VENV)/ready

demo: install
	@run=runs/demo-$$(date +%Y%m%d-%H%M%S) && \
	$(BIN)/rlkit train sac --env HalfCheetah-v5 --steps $(DEMO_STEPS) --seed 0 \
	    --learning_rate 1e-3 --ent_coef auto_0.1 --batch_size 128 \
	    --eval_every 2000 --log_every 1000 --eval_episodes 5 --out $$run && \
	echo "learning curve: $$($(BIN)/rlkit plot $$run)"

test: lint types package
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

copy: install
	@rm -rf build && mkdir -p build/copy
	$(PIP) --no-deps --target build/copy .

# On an installed copy: in the checkout, mypy would see only what lies under rlkit/.
types: copy
	MYPYPATH=build/copy $(BIN)/mypy -p rlkit

# The copy works from elsewhere, and brings no top-level `envs` or `trainers`.
package: copy
	@test ! -e build/copy/envs -a ! -e build/copy/trainers -a -e build/copy/rlkit/py.typed
	cd build && PYTHONPATH=copy ../$(BIN)/python -c \
	    "import rlkit, rlkit.envs; assert 'copy' in rlkit.__file__; rlkit.SAC; from rlkit.trainers import TRAINERS"

bench: install
	$(PIP) -e '.[bench]'
	$(BIN)/rlkit bench

clean:
	rm -rf $(VENV) build *.egg-info
