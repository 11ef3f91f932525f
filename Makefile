# make demo: train on real data under every policy.   make test: prove the ops against fp64.   make help: the rest.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PACKAGES := torch triton numpy setuptools wheel ninja pytest pytest-xdist pytest-timeout hypothesis expecttest \
	ruff clang-format torch-abi-audit abi3audit scikit-learn matplotlib tqdm \
	transformers accelerate lightning-fabric safetensors onnx onnxruntime onnxscript
OUT := bench/out
LIBRARY := mpkernels/_C.abi3.so
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export MAX_JOBS ?= 2

.PHONY: help demo test sweep bench report lint wheel build clean

help:
	@echo "make demo    train digits under every policy (demo/results.json, demo/loss.png)"
	@echo "make test    lint, build, and every test that takes less than 12 minutes together"
	@echo "make sweep   the long tests: all tiles x architectures ahead of time, large sweeps (FULL=1 for more)"
	@echo "make bench   check and time every op against its peers (QUICK=1: less than ten minutes), rows in bench/out"
	@echo "make report  tables of README.md and docs/performance.md, and plots, from the rows in bench/results"
	@echo "make wheel   one wheel for every supported torch and Python, in dist/"
	@echo "make lint    ruff and clang-format"

demo: build
	$(PY) examples/digits_mlp.py

test: lint build
	$(PY) -m pytest -n 2 --dist worksteal -m "not sweep"

sweep: build
	$(PY) -m pytest -n 2 --dist worksteal -m sweep

bench: build
	@mkdir -p $(OUT)
	$(PY) -m bench $(if $(QUICK),--quick) --out $(OUT)

report: $(VENV)/installed
	$(PY) -m bench.report

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc tests/host tests/device -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

wheel: build
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

build: $(LIBRARY)

# Built by ninja, again where a source is newer; a .pth file puts this folder on the path instead of an install.
$(LIBRARY): $(VENV)/installed $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

$(VENV)/installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PACKAGES)
	@echo "$(CURDIR)" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mpkernels.pth"
	@touch $@

clean:
	rm -rf build dist *.egg-info $(LIBRARY) demo bench/out
