# Two commands for a newcomer: `make demo` and `make test`. Everything happens in .venv; nothing outside is touched.
PYTHON ?= python3
DEMO ?= demo
BIN := .venv/bin

.PHONY: demo test check bench fmt clean

demo: .venv/run
	$(BIN)/franca demo $(DEMO)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=8

check: .venv/dev
	$(BIN)/ruff check franca tests benchmarks
	$(BIN)/ruff format --check franca tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/dev
	$(BIN)/python -m benchmarks.run

fmt: .venv/dev
	$(BIN)/ruff check --fix franca tests benchmarks
	$(BIN)/ruff format franca tests benchmarks

clean:
	rm -rf .venv demo build *.egg-info

# Versions come from constraints.txt: names and versions only, so that every index and mirror serves them.
.venv/run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
