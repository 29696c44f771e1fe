# Two commands for a newcomer: `make demo` and `make test`. Everything happens in .venv; nothing outside is touched.
PYTHON ?= python3
DEMO ?= demo
BIN := .venv/bin

.PHONY: demo test check bench bench-parallel fmt clean

demo: .venv/run
	$(BIN)/franca demo $(DEMO)

test: check .venv/slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=8

check: .venv/dev
	$(BIN)/ruff check franca tests benchmarks experiments
	$(BIN)/ruff format --check franca tests benchmarks experiments
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/dev
	$(BIN)/python -m benchmarks.run

bench-parallel: .venv/dev
	$(BIN)/python -m benchmarks.run parallel

fmt: .venv/dev
	$(BIN)/ruff check --fix franca tests benchmarks experiments
	$(BIN)/ruff format franca tests benchmarks experiments

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

# A Slurm for the tests: where the machine has none, the packages of Debian or Ubuntu are unpacked here, not installed.
SLURM := slurmctld slurmd slurm-client slurm-wlm-basic-plugins
APT = apt-get -qq -o Dir::State::lists="$(CURDIR)/$@.new/apt/lists" -o Dir::Cache="$(CURDIR)/$@.new/apt"
.venv/slurm:
	rm -rf $@.new && mkdir -p $@.new/apt/lists/partial $@.new/apt/archives/partial
	set -e; PATH=$$PATH:/usr/sbin:/sbin; command -v slurmctld && exit; cd $@.new/apt; \
	command -v apt-get || { echo 'No Slurm, and no apt to get it: install slurmctld, slurmd and their commands.'; exit 1; }; \
	$(APT) update; \
	$(APT) download $(SLURM) $$($(APT) -s install --no-install-recommends $(SLURM) | sed -n 's/^Inst \(lib[^ ]*\) .*/\1/p'); \
	for package in *.deb; do dpkg -x $$package ..; done; \
	for file in ../usr/sbin/*-wlm; do ln -s $$(basename $$file) $${file%-wlm}; done
	rm -rf $@.new/apt && mv $@.new $@
