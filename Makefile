# make demo | test | test-all | docs | wheel | wheel-aarch64 | wheel-vulkan | wheel-cuda | lock | check | check-vulkan | check-cuda | check-arm64 | check-windows | check-container | clean    BACKEND=cpu|cuda|vulkan   PYTHON=python3
# Everything is made once and reused. What is installed is locked with its hashes in tools/release/requirements (make lock writes them). On a
# machine without a GPU, PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU wheels saves the download of the CUDA libraries; where
# pip has such an index of its own, or PIP_FIND_LINKS, PyTorch alone comes from there by its version.
PYTHON  ?= python3
BACKEND ?= cpu
VENV    := .venv
READY   := $(VENV)/ready
PIP     := $(VENV)/bin/python -m pip install --disable-pip-version-check
LOCKED  := $(PIP) --require-hashes --no-deps
LOCKS   := tools/release/requirements
PYTEST   = PYTHONHASHSEED=0 $(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# what is compiled is kept: tests start thousands of commands, none of which need compile the package again
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-all docs wheel lock check clean llama stock
.PHONY: check-vulkan check-cuda check-arm64 check-windows check-container
.PHONY: trust-fuzz trust-faults trust-server trust-coverage trust-supply trust-mutants trust-sanitizers

demo: llama
	$(VENV)/bin/python tools/demo.py

# all tests but those marked nightly; test-all runs these, too; both compile what tests run, the wheel's llama.cpp included
test: llama stock wheel
	$(PYTEST) $(PYTEST_ARGS)

test-all: llama stock wheel
	$(PYTEST) -m "" $(PYTEST_ARGS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --config-file tools/pages/mkdocs.yml
	@echo "open build/site/index.html, or serve it, so that its search works: python3 -m http.server -b 127.0.0.1 -d build/site"

wheel: $(READY)
	$(VENV)/bin/python tools/release/wheels.py

# wheel-aarch64, wheel-vulkan, wheel-cuda: in a folder of their own below dist/
wheel-%: $(READY)
	$(VENV)/bin/python tools/release/wheels.py --kind $* --out dist/$*

check: $(READY)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tools/check.sh

# SECONDS_EACH=1200 make trust-fuzz   TRIALS=300 make trust-faults   SAMPLE=150 make trust-mutants
trust-fuzz: $(READY)
	$(VENV)/bin/python tools/trust/fuzz.py --seconds $(or $(SECONDS_EACH),60) $(TRUST_ARGS)

trust-faults: llama
	$(VENV)/bin/python tools/trust/faults.py --trials $(or $(TRIALS),60) $(TRUST_ARGS)

trust-server: llama
	$(VENV)/bin/python tools/trust/server.py --seconds $(or $(SECONDS_EACH),1200) $(TRUST_ARGS)

# the whole suite under coverage; PYTEST_ARGS selects less of it
trust-coverage: llama
	$(VENV)/bin/python tools/trust/branches.py $(TRUST_ARGS) $(PYTEST_ARGS)

# TRUST_ARGS="--only lock" make trust-supply
trust-supply: $(READY)
	$(VENV)/bin/python tools/trust/supply.py $(TRUST_ARGS)

lock: $(READY)
	$(VENV)/bin/python tools/release/lock.py $(LOCK_ARGS)

trust-mutants: $(READY)
	nice $(VENV)/bin/python tools/trust/mutants.py --sample $(or $(SAMPLE),150) $(TRUST_ARGS)

# MUTANTS=200 make trust-sanitizers
trust-sanitizers: llama
	nice $(VENV)/bin/python tools/trust/sanitizers.py --mutants $(or $(MUTANTS),2000) $(TRUST_ARGS)

# with what is installed without a compiler: the wheel and, beside it, the library of the Vulkan wheel
check-vulkan: wheel wheel-vulkan
	rm -rf build/vulkan
	$(PIP) --quiet --no-deps --no-index --target build/vulkan dist/mone_llama-*.whl dist/vulkan/*.whl
	PYTHONPATH=build/vulkan $(VENV)/bin/python -m pytest -s tests/test_gpu.py -k vulkan $(PYTEST_ARGS)

check-cuda: $(READY)
	$(VENV)/bin/python tools/patches/check_cuda.py

check-arm64: $(READY)
	@command -v aarch64-linux-gnu-g++ qemu-aarch64 > /dev/null || \
		{ echo "needs a cross compiler and an emulator: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	$(VENV)/bin/mone-llama build > /dev/null
	$(MAKE) wheel-aarch64
	CHECK_ARM64=1 $(VENV)/bin/python -m pytest -s tests/test_arm64.py $(PYTEST_ARGS)

# by chroot, as root; wheels of PyTorch in a folder: CONTAINER_ARGS="--arg PIP_FIND_LINKS=DIR --folder DIR"
check-container: wheel
	$(VENV)/bin/python tools/release/container.py $(CONTAINER_ARGS)

check-windows: llama
	nice $(VENV)/bin/python tools/release/windows.py

llama: $(READY)
	$(VENV)/bin/mone-llama build --backend $(BACKEND) > /dev/null

# llama.cpp without the patches, as far as tests compare with it
stock: $(READY)
	$(VENV)/bin/mone-llama build --stock --target llama > /dev/null
	$(VENV)/bin/mone-llama build --stock --target ggml-rpc-server > /dev/null

$(READY): pyproject.toml $(wildcard $(LOCKS)/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "needs Python's venv: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) -r $(LOCKS)/build.txt
	$(LOCKED) --no-build-isolation -r $(LOCKS)/all.txt
	$(VENV)/bin/python -m pip config list | grep -E 'find-links|index-url' > /dev/null || $(LOCKED) -r $(LOCKS)/torch.txt
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
