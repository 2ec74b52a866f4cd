# `make demo` and `make test` are all a newcomer needs: each sets up what it uses first.
PYTHON := .venv/bin/python
TEST_ARGS ?=
BENCH_ARGS ?=
MINUTES ?= 30

.PHONY: setup peers demo test ceph-test check bench bench-peers bench-fleet bench-stores soak fuzz guest clean
.DEFAULT_GOAL := test

setup:
	@tools/setup

# What `make bench` compares basefs with; nothing else needs it.
peers: setup
	@tools/setup peers

demo: setup guest
	@$(PYTHON) -m tools.demo

test: setup guest
	@tools/test $(TEST_ARGS)

# Volumes on a real Ceph, with Cinder's and Glance's stock RBD drivers; not in `test`, for its packages take 20 s and 220 MB.
ceph-test: setup
	@tools/setup ceph
	@$(PYTHON) -m pytest -m ceph $(TEST_ARGS)

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy -p tools
	.venv/bin/lint-imports

# The Debian guest of the demo, the boot tests and the benchmarks; kept under .cache.
guest: setup
	@$(PYTHON) -m tools.guest build

# All figures side by side in one run; `make bench-boot` and so on for one of them. The peers come last: half an hour.
bench: setup peers guest
	@$(PYTHON) -m tools.bench; code=$$?; $(PYTHON) -m tools.bench.peers $(BENCH_ARGS) && exit $$code

# basefs beside what else brings an image to a node; `make bench-peers BENCH_ARGS="--alternations 1"` takes half of the half hour.
bench-peers: peers guest
	@$(PYTHON) -m tools.bench.peers $(BENCH_ARGS)

# 1, 4 and 20 nodes that boot one image at once, over Glance, over the cache tier and over rbd; as root.
bench-fleet: setup guest
	@tools/setup ceph
	@$(PYTHON) -m tools.bench.fleet $(BENCH_ARGS)

# Images read from a real Ceph.
bench-stores: setup guest
	@tools/setup ceph
	@$(PYTHON) -m tools.bench stores

bench-%: setup
	@$(PYTHON) -m tools.bench $*

# What a node goes through in a year: kills, a cache too small, all at once, ten minutes without Glance; `make soak MINUTES=n` scales.
soak: setup guest
	@$(PYTHON) -m tools.soak --minutes $(MINUTES) $(PHASES)

# What basefs reads from disks, sockets and Glance, mutated: `make fuzz MINUTES=n` (all targets together).
fuzz: setup
	@$(PYTHON) -m tools.fuzz all $(MINUTES)

clean:
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
