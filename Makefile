# make bench   the main job: tensor-parallel ranks on real photographs        make test    the whole suite
# make check   linters, types, formats, builds with -Werror                   make format  what check would complain of
# make bench-async   the same on a stream of requests that arrive faster than they can be served
# make bench-gc   1,000 dead arenas swept at once, how soon a death is noticed, what watching costs
# make test-sglang, make bench-sglang   against SGLang's own classes, in ./.venv-sglang (some 3 GB)
# make soak   processes killed at random, under load; SOAK_SECONDS=60       make soak-modes   all modes switched under load
# make sanitize   the C core and its tests under sanitizers               make fuzz   FUZZ_SECONDS=60 of each harness
#
# Needs git, python3 (3.10 or newer, with venv and headers), a C compiler; no root. The rest goes into ./.venv.
# Variables: ARGS=... for the program that is run; PYTHON=... to build the environment from;
# TORCH_INDEX=... where a CPU build of torch is looked for if your own package index has none; empty: nowhere else.

PYTHON ?= python3
ARGS ?=
FUZZ_SECONDS ?= 60
TORCH_VERSION = 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BUILD_TOOLS = "pip>=23.1" "scikit-build-core>=0.11" "cmake>=3.20" ninja setuptools

VENV = .venv
CORE = .venv-core
SGLANG = .venv-sglang
PIP = bin/python -m pip --disable-pip-version-check --no-input
PY = $(VENV)/bin/python

SOURCES = $(wildcard native/*.c native/*.h)
C_FILES = $(SOURCES) $(wildcard tests/model/*.[ch] tests/native/*.c tests/fuzz/*.[ch])
# The directory too: a file that is added or removed changes it. Python files are used from the tree as they are.
BUILD_INPUTS = CMakeLists.txt pyproject.toml native $(SOURCES)

.PHONY: help bench bench-async bench-core bench-gc bench-sglang test test-core test-sglang sanitize fuzz soak soak-modes check format clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

bench: $(VENV)/.installed
	@mkdir -p build
	$(PY) benchmarks/tp_shm.py --json build/bench.json --plot build/bench.svg $(ARGS)

bench-async: $(VENV)/.installed
	@mkdir -p build
	$(PY) benchmarks/tp_shm.py --rate 60 --json build/bench-async.json --plot build/bench-async.svg $(ARGS)

bench-core: $(VENV)/.installed
	@mkdir -p build
	$(PY) benchmarks/core.py --json build/bench-core.json $(ARGS)

bench-gc: $(VENV)/.installed
	@mkdir -p build
	$(PY) benchmarks/sweep.py --json build/bench-gc.json $(ARGS)

test: $(VENV)/.installed
	$(PY) -m pytest $(ARGS)

# Everything but what is specific to torch and zmq, where neither is installed.
test-core: $(CORE)/.installed
	SHMCAST_TEST_CORE=1 $(CORE)/bin/python -m pytest $(ARGS)

# Against the engine itself, on the CPU: its packages are many, and it wants a torch of its own, so it has its own place.
test-sglang: $(SGLANG)/.installed
	@if test -s $(SGLANG)/.installed; then cat $(SGLANG)/.installed; else $(SGLANG)/bin/python -m pytest tests/engines $(ARGS); fi

bench-sglang: $(SGLANG)/.installed
	@if test -s $(SGLANG)/.installed; then cat $(SGLANG)/.installed; else mkdir -p build && \
	    $(SGLANG)/bin/python benchmarks/sglang.py --json build/bench-sglang.json --plot build/bench-sglang.svg $(ARGS); fi

# Random kills under load; SOAK_SECONDS=3600 by hand, ARGS="--seed 7" to repeat a run.
SOAK_SECONDS ?= 60
soak: $(VENV)/.installed
	$(PY) tests/soak.py --seconds $(SOAK_SECONDS) $(ARGS)

# A caster's modes switched ten times a second, everything compared on three ranks.
soak-modes: $(VENV)/.installed
	$(PY) tests/modes_soak.py --seconds $(SOAK_SECONDS) $(ARGS)

# In the environment without torch: what is looked at is ours, and imports faster.
sanitize: $(CORE)/.installed
	$(CORE)/bin/python tests/sanitize.py $(ARGS)

# Two harnesses at a time. clang with libFuzzer is used where it is installed, atheris where it can be.
fuzz: $(CORE)/.fuzzers
	$(CORE)/bin/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS) $(ARGS)

check: $(VENV)/.checkers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)
	@for compiler in gcc clang; do \
	    if command -v $$compiler >/dev/null; then \
	        echo "build with $$compiler -Werror"; \
	        $(VENV)/bin/cmake -S . -B build/werror-$$compiler -G Ninja -DCMAKE_C_COMPILER=$$compiler -DSHMCAST_WERROR=ON \
	            -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) >build/werror.log \
	            || { cat build/werror.log; exit 1; }; \
	        $(VENV)/bin/cmake --build build/werror-$$compiler || exit 1; \
	    fi; \
	done

format: $(VENV)/.checkers
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(C_FILES)

# Stamps: a target that finds its stamp newer than what it was made from installs nothing.

%/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "set up shmcast: needs Python 3.10 or newer, '$(PYTHON)' is not; say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "set up shmcast: '$(PYTHON)' can not make virtual environments; install python3-venv or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	    { echo "set up shmcast: '$(PYTHON)' has no C headers; install python3-dev or say make PYTHON=..." >&2; exit 1; }
	@test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/$(PIP) install $(BUILD_TOOLS)
	@touch $@

# The first time, and when pyproject.toml has changed, with all dependencies in one call, so that nothing that depends
# on torch can choose another one; otherwise only our own few files are built, in a build folder that is kept.
INSTALL = install --no-build-isolation --config-settings=build-dir=build/editable-$(@D)

$(VENV)/.installed: $(VENV)/.created $(BUILD_INPUTS)
	@mkdir -p build
	@if test $(VENV)/.dependencies -nt pyproject.toml; then \
	    $(VENV)/$(PIP) $(INSTALL) --quiet --no-deps --editable .; \
	else \
	    $(call find_torch,$(VENV)) \
	    $(VENV)/$(PIP) $(INSTALL) $$index torch==$(TORCH_VERSION) --editable '.[torch,zmq,bench,test]' && touch $(VENV)/.dependencies; \
	fi
	@touch $@

$(CORE)/.installed: $(CORE)/.created $(BUILD_INPUTS)
	@mkdir -p build
	$(CORE)/$(PIP) $(INSTALL) --quiet --editable '.[test]'
	@touch $@

$(VENV)/.checkers: $(VENV)/.installed
	@test $@ -nt pyproject.toml || $(VENV)/$(PIP) $(INSTALL) --editable '.[check]'
	@touch $@

# What SGLang needs to be imported without a GPU, in one call, so that nothing chooses another torch; then itself, whose own
# list would bring the GPU's libraries. Where it can not be had the stamp says why, and what asks for it says so and ends.
SGLANG_VERSION = 0.5.23
SGLANG_NEEDS = torchvision triton transformers numpy orjson psutil pybase64 requests packaging pillow starlette msgspec pydantic \
    pyzmq tqdm ipython aiohttp dill apache-tvm-ffi==0.1.11 sentencepiece compressed-tensors gguf openai partial-json-parser \
    setproctitle fastapi uvloop einops uvicorn matplotlib

$(SGLANG)/.dependencies: $(SGLANG)/.created
	@if ! $(SGLANG)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	    echo "SGLang $(SGLANG_VERSION) is left out: it is for Python 3.11, '$(PYTHON)' is another; say make PYTHON=..." >$@; \
	else \
	    pip='$(SGLANG)/$(PIP)'; $(call find_torch,$(SGLANG)) \
	    { $$pip install $$index torch==$(TORCH_VERSION) $(SGLANG_NEEDS) && \
	      $$pip install --no-deps sglang==$(SGLANG_VERSION) && : >$@; } || \
	    echo "SGLang $(SGLANG_VERSION) is left out: it, or what it needs, can not be installed here; see above (to try again: rm -r $(SGLANG))" >$@; \
	fi

$(SGLANG)/.installed: $(SGLANG)/.dependencies $(BUILD_INPUTS)
	@mkdir -p build
	@test -s $< || $(SGLANG)/$(PIP) $(INSTALL) --quiet --editable '.[zmq,test]'
	@cp $< $@

$(CORE)/.fuzzers: $(CORE)/.installed
	@test $@ -nt pyproject.toml || $(CORE)/$(PIP) $(INSTALL) --quiet --editable '.[fuzz]' || \
	    echo "set up shmcast: there is no atheris for this Python; the decoders get changed inputs of the corpus" >&2
	@touch $@

# Sets $$index. A torch that is installed, or that pip would find by itself as a CPU build, is taken as it is; only
# otherwise is TORCH_INDEX asked, once and briefly, since pip would try an unreachable one again for every package.
FIND_TORCH = index versions torch $(1) 2>/dev/null | grep -qF '$(TORCH_VERSION)+cpu'
define find_torch
index=; \
if $(1)/$(PIP) show --quiet torch 2>/dev/null; then :; \
elif $(1)/$(PIP) $(call FIND_TORCH); then :; \
elif test -z "$(TORCH_INDEX)"; then :; \
elif PIP_CONFIG_FILE=/dev/null $(1)/$(PIP) --isolated --retries 0 --timeout 10 \
    $(call FIND_TORCH,--index-url $(TORCH_INDEX)); then index="--extra-index-url $(TORCH_INDEX)"; \
else echo "set up shmcast: no CPU build of torch at '$(TORCH_INDEX)'; taking the one of your package index" >&2; fi;
endef

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(CORE)/.installed $(SGLANG)/.installed

distclean: clean
	rm -rf $(VENV) $(CORE) $(SGLANG)
