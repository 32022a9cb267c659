# Everything a developer or user runs, by name: `make help`.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
LATEST_VENV ?= .venv-latest
LOCK_VENV ?= .venv-lock
export MOTO_VENV ?= $(CURDIR)/.venv-moto
BIN := $(VENV)/bin
PARALLEL := --numprocesses 2 --dist worksteal
# A lock names every package, so pip must not add one.
LOCKED := install --quiet --no-deps --requirement
# Only the tests need torch. On PyPI its Linux wheels bring CUDA along; for the CPU build:
#   make test TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=
APT_PACKAGES := gcc python3-dev python3-venv liburing-dev libxxhash-dev
TEST_APT_PACKAGES := fuse3 g++ chromium libibverbs1 redis-server
CEPH_APT_PACKAGES := ceph-mon ceph-osd radosgw
MACHINE_APT_PACKAGES := xfsprogs btrfs-progs dosfstools e2fsprogs ntfs-3g iproute2 nftables redis-server

.PHONY: help setup ext demo moto test test-system test-s3 test-latest test-vllm test-vllm-code soak-vllm lock check \
	lint types gpu mutants coverage sanitize bench soak wheel clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(VENV)/.setup  ## System packages, venv, dependencies, the extension

$(VENV)/.setup: pyproject.toml setup.py $(wildcard ext/*.c ext/*.h) scripts/system-packages \
		requirements/run.txt
	scripts/system-packages $(APT_PACKAGES)
	$(PYTHON) -c 'import sys; sys.exit("FlexKV needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip $(LOCKED) requirements/run.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.setup-dev: $(VENV)/.setup requirements/dev.txt requirements/torch.txt
	scripts/system-packages $(TEST_APT_PACKAGES) || echo 'some tests need $(TEST_APT_PACKAGES)'
	$(BIN)/python -m pip $(LOCKED) requirements/dev.txt
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) --constraint requirements/torch.txt torch
	touch $@

ext: $(VENV)/.setup  ## Build the extension again, in place
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: $(VENV)/.setup  ## Run the main job and verify every byte; TRACE=file.jsonl replays a trace
	$(BIN)/flexkv demo $(if $(TRACE),--trace $(TRACE)) $(ARGS)

$(MOTO_VENV)/.setup: scripts/moto-venv requirements/moto.txt
	scripts/moto-venv $(MOTO_VENV) $(PYTHON)
	touch $@

moto: $(MOTO_VENV)/.setup  ## A server that speaks S3, in a venv of its own, for the tests

test: $(VENV)/.setup-dev $(MOTO_VENV)/.setup  ## Run the tests, on two cores; ARGS="-n 0 tests/unit" for some, in one process
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-system: $(VENV)/.setup-dev  ## The tests that mount file systems, make cgroups and networks: as root
	scripts/system-packages $(MACHINE_APT_PACKAGES) || echo 'some tests need $(MACHINE_APT_PACKAGES)'
	$(BIN)/python -m pytest tests/machine $(ARGS)

test-s3: $(VENV)/.setup-dev  ## The tests of the remote tier on a real S3 server, Ceph's (240 MB to install)
	scripts/system-packages $(CEPH_APT_PACKAGES)
	S3_SERVER=rgw $(BIN)/python -m pytest -k 's3 or remote_faults or hostile or bucket' \
		tests/contract/test_remote*.py tests/system/test_remote*.py $(ARGS)

test-latest: $(MOTO_VENV)/.setup  ## The tests with the newest releases of everything, in a venv of their own
	scripts/system-packages $(APT_PACKAGES) $(TEST_APT_PACKAGES)
	test -x $(LATEST_VENV)/bin/python || $(PYTHON) -m venv $(LATEST_VENV)
	$(LATEST_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(LATEST_VENV)/bin/python -m pip install --quiet --upgrade $(TORCH_INDEX) torch
	$(LATEST_VENV)/bin/python -m pip list
	$(LATEST_VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

lock:  ## Renew the locks; ARGS="--upgrade-package ruff" renews one package
	scripts/lock $(LOCK_VENV) $(ARGS)

check: lint types test  ## Format, lint, types, tests

lint: $(VENV)/.setup-dev  ## ruff
	$(BIN)/ruff check .

types: $(VENV)/.setup-dev  ## mypy strict; pyright on the public surface
	$(BIN)/mypy
	$(BIN)/pyright

gpu: $(VENV)/.setup-dev  ## The tests that need a GPU, the kernel's under compute-sanitizer too
	$(BIN)/python -m pytest -m gpu tests/gpu
	for tool in memcheck racecheck; do compute-sanitizer --tool $$tool \
		--report-api-errors no --error-exitcode 1 \
		$(BIN)/python -m pytest -q -m gpu tests/gpu \
		-k 'bytes_come_back and (kernel or staged) and bfloat16 or slots_of' || exit 1; done

$(VLLM_VENV)/.setup: pyproject.toml scripts/vllm-venv scripts/vllm-tests \
		requirements/vllm.txt requirements/vllm-sources.txt
	scripts/system-packages $(APT_PACKAGES) libnuma1 curl
	scripts/system-packages fuse3 || echo 'some tests need fuse3'
	TORCH_INDEX='$(TORCH_INDEX)' scripts/vllm-venv $(VLLM_VENV) $(PYTHON)
	scripts/vllm-tests $(VLLM_VENV)/upstream $(VLLM_VENV)
	touch $@

test-vllm: $(VLLM_VENV)/.setup $(MOTO_VENV)/.setup  ## Real vLLM engines on the CPU, with and without FlexKV (0.7 GB to install)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm tests/unit/test_backing.py tests/test_locks.py $(ARGS)

test-vllm-code: $(VLLM_VENV)/.setup  ## The same on the code of a newer vLLM; ENGINES=1 for those with engines, too
	for code in $(abspath $(VLLM_VENV))/upstream/*/code; do PYTHONPATH=$$code$${PYTHONPATH:+:$$PYTHONPATH} \
		$(VLLM_VENV)/bin/python -m pytest tests/vllm tests/unit/test_backing.py $(ARGS) || exit 1; done

soak-vllm: $(VLLM_VENV)/.setup  ## The tests under vLLM that test-vllm leaves out; about an hour
	$(VLLM_VENV)/bin/python -m pytest -m soak tests/vllm $(ARGS)
	ALL_SCENARIOS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm/test_upstream.py $(filter --write-support,$(ARGS))

mutants: $(VENV)/.setup-dev $(VLLM_VENV)/.setup $(MOTO_VENV)/.setup  ## Small changes that a test should notice; ARGS="--sample 50 --seed 7"
	$(BIN)/python -m tests.mutation $(ARGS)

coverage: $(VENV)/.setup-dev $(MOTO_VENV)/.setup  ## Branch coverage of the pure folders; fails below 95 %
	$(BIN)/python -m pytest -q --cov --cov-report=term-missing:skip-covered --cov-fail-under=95 tests

sanitize: $(VENV)/.setup-dev  ## The extension's tests under ASan and UBSan
	PYTHON=$(BIN)/python ext/sanitize.sh

bench: $(VENV)/.setup-dev  ## Benchmarks, side by side with their limits; ARGS="disk --repeats 5"
	$(BIN)/python -m benchmarks $(ARGS)

soak: $(VENV)/.setup-dev $(MOTO_VENV)/.setup  ## Fresh simulations, long property tests, many crashes and faults; about an hour
	CLUSTER_NODES=1000 CLUSTER_SEEDS=200 SIMULATION_SEEDS=10000 POOL_SPANS=100000 POOL_SEEDS=3 SIMULATION_FIRST=$${SIMULATION_FIRST:-$$(date +%s)00} \
	REMOTE_FAULTS=10000 REMOTE_FAULT_FIRST=$${REMOTE_FAULT_FIRST:-$$(date +%s)00} \
	PEER_FAULTS=10000 PEER_FAULT_FIRST=$${PEER_FAULT_FIRST:-$$(date +%s)00} \
	INDEX_OPERATIONS=120000 KILLS=200 DAMAGES=10000 POWER_LOSSES=1000 HYPOTHESIS_PROFILE=soak FUZZ_FRAMES=100000 FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)} \
	$(BIN)/python -m pytest -q tests/simulation tests/property tests/system/test_warm.py \
	tests/system/test_crash.py tests/system/test_power_loss.py tests/system/test_fuzz.py \
	tests/system/test_remote_faults.py tests/system/test_wire_faults.py
	MANY_ROUNDS=60 MANY_SEED=$${MANY_SEED:-$$(date +%s)} $(BIN)/python -m pytest -q -s -m soak tests/system/test_many_nodes.py
	scripts/system-packages $(MACHINE_APT_PACKAGES) || echo 'some tests need $(MACHINE_APT_PACKAGES)'
	SHARING_ROUNDS=100 SHARING_SEED=$${SHARING_SEED:-$$(date +%s)} FUZZ_FRAMES=100000 FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)} \
	$(BIN)/python -m pytest -q -s tests/machine/test_sharing_soak.py tests/machine/test_sharing_strangers.py
	PARTITION_ROUNDS=200 PARTITION_SEED=$${PARTITION_SEED:-$$(date +%s)} \
	$(BIN)/python -m pytest -q --log-cli-level=INFO tests/machine/test_mooncake_partitions.py

wheel: $(VENV)/.setup  ## One abi3 wheel, in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## Remove what the targets made
	rm -rf $(VENV) $(LATEST_VENV) $(LOCK_VENV) $(MOTO_VENV) build dist *.egg-info flexkv/_ext*.so
