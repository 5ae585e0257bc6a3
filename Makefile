# Two commands on a fresh Linux machine (Python >= 3.10, a C++ compiler; what they download they say first):
#   make demo     fine-tunes a real sentence encoder with forward passes only
#   make demo-lm  the same with a language model: 95 MB are downloaded once, some six minutes of training
#   make test     runs the tests
# Everything is installed into .venv. On a machine without a GPU the CPU build of PyTorch is a tenth of the download:
#   make test PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_TORCH ?=
BENCH_SECONDS ?= 900
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install $(if $(CI),,--progress-bar raw)
# A long command in one line of the terminal, by $(call tell,LOG,NAME,COMMAND); in CI with all of its output.
tell = $(if $(CI),$(3),$(PYTHON) tools/tell.py --log build/$(1).log $(2) $(3))
SOURCES = pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

.PHONY: setup demo demo-lm test test-built coverage test-slow faults fuzz matrix arm test-kernels wheel test-wheel lint format docs docs-serve bench clean
setup: $(VENV)/.installed

$(VENV)/.torch:
	@echo "zokern is set up in $(VENV), once. To download: PyTorch (0.2 GB for CPUs, 3 GB with CUDA's libraries), and 0.3 GB"
	@echo "of libraries, for the tests 0.3 GB more. The kernels are built here: some six minutes in all, on two cores."
	@$(call tell,setup,"an environment of Python",$(PYTHON) -m venv $(VENV))
	@$(call tell,setup,"pip",$(BIN)/python -m pip install --upgrade pip setuptools wheel)
	@$(call tell,setup,"PyTorch",$(PIP) $(PIP_TORCH) $(TORCH))
	@$(call tell,setup,"what builds the kernels",$(PIP) cmake ninja pybind11)
	@touch $@

# Built in the environment that runs it, so that a second build compiles only what changed. A demo needs none of the tests'
# libraries; an environment that has them has all.
$(VENV)/.installed: FOR = tests
$(VENV)/.installed: EXTRA = dev
$(VENV)/.demo: FOR = demo
$(VENV)/.demo: EXTRA = demo
$(VENV)/.installed $(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@export PATH="$(abspath $(BIN)):$$PATH"; \
	$(call tell,setup,"the kernels and the libraries of the $(FOR)",$(PIP) --no-build-isolation -e ".[$(EXTRA)]")
	@touch $@
FOR_DEMO = $(if $(wildcard $(VENV)/.installed),$(VENV)/.installed,$(VENV)/.demo)
NEXT = @echo "next: your own texts, in docs/quickstart.md, and $(BIN)/zokern finetune --help"

demo: $(FOR_DEMO)
	@$(BIN)/zokern finetune --output demo-out --force
	$(NEXT)

# SmolLM2-135M learns whether a sentence of a film review is kind: docs/finetune.md has what comes out.
DEMO_LM = --model smollm2 --data movie-snippets --one-sided --num-samples 4 --lr 2e-4 --steps 100 --eval-every 25
demo-lm: $(FOR_DEMO)
	@$(BIN)/zokern finetune $(DEMO_LM) --output demo-lm-out --force
	$(NEXT)

test: setup
	@echo "the tests: some eight minutes on two cores"
	@$(call tell,test,--last 2 "the tests",$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder)
	@echo "next: make demo, or docs/quickstart.md"

# What nvcc and Triton made of the kernels: its machine code within limits, and a selection of it run without a GPU.
test-built: setup
	$(BIN)/python -m pytest -m built -n auto --dist loadfile tests/benchmarks tests/passes/test_ops.py tests/ptx

# The suite again, with the lines of the package that it reaches; looking on takes half as long again.
coverage: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --cov=zokern --cov-report=term:skip-covered

test-slow: setup
	$(BIN)/python -m pytest -m slow_machine_code

# Kills, flipped bits, exceptions everywhere, full disks: about half an hour. ZOKERN_FAULTS=200: how many kills of a command.
faults: setup
	$(BIN)/python -m pytest -m faults

# Journals from elsewhere, a million of them, against the kernels with sanitizers. FUZZ="--runs 5000", --help: other selections.
fuzz: setup
	$(BIN)/python -m pip install --quiet "atheris>=2.3"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.fuzz $(FUZZ)

# The CUDA and Triton kernels without a GPU, hours on two processors. PTX="--quick", "--arch 90 --seconds 600", --help: other selections.
test-kernels: setup
	$(BIN)/python -m tests.ptx $(PTX)

# Each Python at hand with the oldest and the newest libraries, about an hour. MATRIX="--python 3.13", --help: other selections.
matrix: setup
	$(BIN)/python -m pip install --quiet "uv>=0.9" "build>=1.2"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.matrix $(MATRIX)

# The CPU's tests on an emulated Arm processor, cross-compiled: twenty minutes. ARM="--processor neoverse-v1", --help: other selections.
arm: setup
	$(BIN)/python -m pip install --quiet "uv>=0.9" "build>=1.2"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.arm $(ARM)

# A wheel with the CUDA kernels for machines without nvcc. setuptools would pack what earlier builds left; auditwheel
# names the oldest Linux that the wheel runs on.
wheel: setup
	rm -rf build/lib.* build/bdist.* build/wheel dist/zokern-*.whl
	PATH="$(abspath $(BIN)):$$PATH" ZOKERN_CUDA=on $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --wheel-dir dist build/wheel/zokern-*.whl

test-wheel: wheel
	TORCH="$(TORCH)" PIP_TORCH="$(PIP_TORCH)" $(BIN)/python -m pytest -m wheel tests/repository/test_wheel.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/jupytext --quiet --to py:percent --output build/notebook.py docs/notebook.ipynb
	$(BIN)/mypy build/notebook.py
	$(BIN)/clang-format --dry-run --Werror $(filter csrc/%,$(SOURCES))

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter csrc/%,$(SOURCES))

# The pages of docs/ as a site of plain files. The variable: no notice of the theme's about other programs.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html; make docs-serve shows the same with its search, and follows changes"

docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# Kernels, whole steps and sizes on this machine's GPU or CPU, then the pages: at most three times BENCH_SECONDS and what
# the case at work takes. make prints each command.
bench: setup
	$(BIN)/zokern bench kernels --no-plot --time-limit $(BENCH_SECONDS) --output benchmarks/results
	$(BIN)/zokern bench step --time-limit $(BENCH_SECONDS) --output benchmarks/results
	$(BIN)/zokern bench scaling --time-limit $(BENCH_SECONDS) --output benchmarks/results
	$(BIN)/python -m benchmarks.pages

clean:
	rm -rf build site $(VENV) zokern/*.so demo-out demo-lm-out
