# make demo, make photo, make test, make lint: each sets up .venv where it is not there, then works.
# The Python that .venv is made of: the first of these that works, 3.10 to 3.13, with ensurepip (Debian: python3-venv).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3.13 python3 python; do \
    $$p -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
UV := uv==0.13.8

# For the photograph: make photo DOWNLOAD=yes fetches SAM's and CLIP's official weights (375 and 351 MB), whose baseline
# names the regions; make photo WEIGHTS=regionspot_bb.pth is with a checkpoint of RegionSpot.
DOWNLOAD ?=
WEIGHTS ?=

.PHONY: help demo photo test test-fast docs gpu-check benchmark lint format detectron2 lock clean
help:
	@echo "make demo   regions of a real photograph, then training and evaluation in a drawn world (output/demo)"
	@echo "make photo  the photograph alone"
	@echo "make test   the tests, on a CPU, with no downloads"
	@echo "make test-fast  the tests but for the slow files, for work in between"
	@echo "make gpu-check  on a machine with CUDA: training, extraction, evaluation and the golden numbers on its GPU"
	@echo "make benchmark  every stage against the plain way on this machine's GPU or CPU; the tables go to docs/performance.md"
	@echo "make docs   the guides and the API reference as a site (output/docs)"
	@echo "make lint   ruff and mypy"
	@echo "make lock   pin the newest versions that setup.py admits in requirements/lock.txt"

demo: photo
	$(BIN)/python -m miniworld demo --output output/demo

photo: $(VENV)/.ready
	$(BIN)/python tools/predict.py \
	    --input "$$($(BIN)/python -c 'import skimage; print(skimage.__path__[0] + "/data/coffee.png")')" \
	    --boxes "172,17,408,308;77,66,479,388;326,66,424,326" --vocabulary "cup,saucer,spoon,espresso,wooden table,zebra" \
	    --output output/demo $(if $(DOWNLOAD),,--cached-weights-only) MODEL.WEIGHTS "$(WEIGHTS)"

# A file's tests share what is slow to set up, so a worker takes whole files, in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.ready
	$(PYTEST)

test-fast: $(VENV)/.ready
	$(PYTEST) -m "not slow"

docs: $(VENV)/.ready
	$(BIN)/uv run --no-project --with-requirements requirements/docs.txt mkdocs build --strict --quiet
	@echo "output/docs/index.html"

gpu-check: $(VENV)/.ready
	$(BIN)/python -m tests.gpu_check

benchmark: $(VENV)/.ready
	$(BIN)/python -m tools.benchmarks all --output output/benchmark --document docs/performance.md

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Made again when a pinned version or a package changes. A detectron2 that is in the environment already is kept.
$(VENV)/.ready: requirements/lock.txt requirements/detectron2.txt setup.py projects/MiniWorld/setup.py
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
	    { echo "no Python 3.10 to 3.13 with venv was found; install one (Debian: python3-venv), or make PYTHON=/its/path"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	$(BIN)/uv pip install --python $(BIN)/python -r requirements/lock.txt
	$(BIN)/python -c 'import detectron2' 2>/dev/null || $(MAKE) --no-print-directory detectron2 TARGET_PYTHON=$(BIN)/python
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e . -e projects/MiniWorld
	touch $@

# Detectron2 from PyPI into the environment of TARGET_PYTHON (this project's, or your own), checked by its sha256.
TARGET_PYTHON ?= python
detectron2:
	$(TARGET_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
	    --implementation cp --python-version 3.10 --abi none --platform any \
	    --target "$$($(TARGET_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" -r requirements/detectron2.txt

lock: $(VENV)/.ready
	$(BIN)/uv pip compile --quiet --refresh-package regionspot --universal --python-version 3.10 --no-header --no-annotate --no-emit-package regionspot requirements/lock.in -o requirements/lock.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate requirements/docs.in -o requirements/docs.txt

clean:
	rm -rf $(VENV) output build *.egg-info .pytest_cache .mypy_cache .ruff_cache
