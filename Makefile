# make train   learn to write Shakespeare, in about five minutes on two cores; FLAGS="--steps 3000" and others go along
# make test    lint, types, tests and coverage; make test-all adds the largest cases, and what is tried exhaustively
# make docs    the site, in docs/_build/html, with warnings as errors
# make format  what `make test` would complain about, as far as a tool can mend it

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FLAGS :=

.PHONY: train test test-all large exhaustive docs format

train: $(READY)
	@$(BIN)/gla-jax train $(FLAGS)

# XLA's compiler takes most of these tests' time; `make large` and `make exhaustive` have it optimize.
test: export XLA_FLAGS := $(XLA_FLAGS) --xla_backend_optimization_level=0
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/pytest -n 2 -m "not large and not exhaustive and not gpu" --cov --cov-report=term:skip-covered --cov-fail-under=90

test-all: test large exhaustive

large: $(READY)
	$(BIN)/pytest -n 2 -m "large and not gpu"

exhaustive: $(READY)
	$(BIN)/pytest -n 2 -m "exhaustive and not gpu"

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt tools/make_venv
	@tools/make_venv $(VENV)
	@touch $@
