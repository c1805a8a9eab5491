# Every target sets up what it needs in .venv and works alone from a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl csrc/CMakeLists.txt) setup.py pyproject.toml

.PHONY: help setup demo test lint format bench table7 evidence report models docs sanitize soak dist lock clean
.DEFAULT_GOAL := help

help:  ## show the targets
	@grep -hE '^[a-z0-9]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# One stamp per set of extras, so that `make demo` does not wait for what only the tests or benches need.
$(VENV)/.demo: $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[cli]'
	@touch $@

# `make test LOCKED=1` takes the versions of requirements/test.txt and nothing that has other hashes.
$(VENV)/.test: $(NATIVE) | $(BIN)/python
ifdef LOCKED
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/test.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
else
	$(BIN)/python -m pip install --quiet -e '.[test,lint]'
endif
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	@touch $@ $(VENV)/.demo

setup: $(VENV)/.test $(VENV)/.bench  ## a .venv with everything

demo: $(VENV)/.demo  ## tune a small ViT on handwritten digits, two minutes on two cores
	$(BIN)/spt-kernels demo --output demo-output --force
	$(BIN)/python -m bench.demo demo-output

# As many tests side by side as there are cores, one thread each; who is done takes over from others.
PYTEST = $(BIN)/python -m pytest -q -n auto --dist worksteal --benchmark-disable
test: export PYTHONDONTWRITEBYTECODE = # each process that a test starts would compile the package anew
test: $(VENV)/.test  ## the whole test suite, then the Triton kernels in the interpreter
	$(PYTEST) --ignore=tests/kernels/interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/interpreter

lint: $(VENV)/.test  ## ruff, mypy, clang-format
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl csrc/tests/*.cpp)

format: $(VENV)/.test  ## write what `make lint` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl csrc/tests/*.cpp)

bench: $(VENV)/.bench table7  ## every op and the paper's cost table beside what a user would otherwise take
	$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-quiet --results bench/results

COSTS = $(BIN)/spt-kernels bench table7 --output bench/results
table7: $(VENV)/.bench  ## the paper's cost table; memory alone in other precisions and architectures
	$(COSTS)
	$(COSTS) --rounds 0 --dtype bf16-autocast
	$(COSTS) --rounds 0 --dtype bf16
	$(COSTS) --rounds 0 --model swin_base_patch4_window7_224
	$(COSTS) --rounds 0 --model convnext_base

evidence: $(VENV)/.bench  ## docs/evidence.md: what the paper says, on photographs; hours, and goes on after a stop
	$(BIN)/python -m bench.evidence.run
	$(BIN)/python -m bench.evidence.report

# `make soak SANITIZE=1` does the same with a C++ module of its own, under the address and undefined-behaviour
# sanitizers, whose allocator then watches the whole process. SOAK is given on: SOAK="--nightly --only ops".
SOAK ?=
SANITIZED := build/sanitized
SANITIZERS := -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
soak: $(VENV)/.test  ## damaged files, kills, odd shapes, endless switches, threads: minutes
ifdef SANITIZE
	rm -rf $(SANITIZED)
	CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED) .
	ln -s ../../bench $(SANITIZED)/bench
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(for it in asan ubsan stdc++; do $${CXX:-c++} -print-file-name=lib$$it.so; done | xargs)" \
		../../$(BIN)/python -m bench.soak $(SOAK)
else
	$(BIN)/python -m bench.soak $(SOAK)
endif

report: | $(BIN)/python  ## the README's tables from the committed results
	$(BIN)/python -m bench.report

# Freed memory is given back: the largest families need it (docs/MEMORY.md, What a measurement takes).
models: export MALLOC_MMAP_THRESHOLD_ = 65536
models: export MALLOC_ARENA_MAX = 1
models: $(VENV)/.bench  ## docs/MODELS.md: which of timm's families work, half an hour on two cores
	$(BIN)/python -m bench.model_families --again

$(VENV)/.docs: $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## the site of these pages, in build/site
	$(BIN)/mkdocs build --strict

$(VENV)/.sanitize: | $(BIN)/python
	$(BIN)/python -m pip install --quiet cmake ninja
	@touch $@

sanitize: $(VENV)/.sanitize  ## the C++ under address, undefined-behaviour and thread sanitizers
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -P csrc/sanitize.cmake

# The wheel is built from the sdist, which so has all it needs. The pure one is for where no other fits.
TRY = build/try/bin
dist: | $(BIN)/python  ## sdist and wheels in dist/, tried in an empty environment; what is in them
	rm -rf dist build/try
	$(BIN)/python -m pip install --quiet build cyclonedx-bom
	$(BIN)/python -m build --outdir dist
	SPT_KERNELS_NO_NATIVE=1 $(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv build/try
	$(TRY)/python -m pip install --quiet "$$(ls dist/*.whl | grep -v none-any)[cli]"
	cd build/try && bin/spt-kernels demo --output demo && bin/python -c "import spt_kernels as spt; print(spt.backends())"
	$(BIN)/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
		-o dist/spt_kernels.cdx.json build/try/bin/python
	$(TRY)/python -m pip install --quiet --no-deps --force-reinstall dist/*-none-any.whl
	cd build/try && bin/spt-kernels demo --output pure && bin/python -c "import spt_kernels as spt; assert not spt.backends().native"

lock: | $(BIN)/python  ## requirements/test.txt anew: what `make test LOCKED=1` installs, with hashes
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra test --extra lint --universal --generate-hashes \
		--no-annotate --quiet --upgrade --custom-compile-command 'make lock' \
		--constraint requirements/tested.txt -o requirements/test.txt

clean:  ## remove what was built, keep .venv
	rm -rf build dist *.egg-info spt_kernels/*.so
