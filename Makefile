# Every target sets itself up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
APT := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test test-slow browser lint bench clean
.DEFAULT_GOAL := setup

setup: $(READY)

# venv and the system libraries behind OpenCV (a dependency of the lvis package) are missing on bare Debian images.
# --no-compile: most modules of these packages are never imported; compiling all of them would take a minute.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "calib needs Python 3.11 or later; set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(APT) update && $(APT) install -y python3-venv; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --progress-bar off -c constraints.txt -e '.[torchvision,transformers,export,gs,ray,report,s3,telemetry,test]'
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { $(APT) update && $(APT) install -y libgl1 libglib2.0-0; }
	@touch $@

# The main job on made-up images: about seven minutes on two cores, with ALL=1 every method. Results lie under demo/.
demo: setup
	$(BIN)/calib demo --out demo $(if $(ALL),--all)

# One thread per worker: two workers with two threads each get in each other's way.
test: lint browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

# The page of calib report is opened in a real browser.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { $(APT) update && $(APT) install -y chromium chromium-driver; }

test-slow: setup browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[bench]'
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script --quick || exit 1; done

clean:
	rm -rf $(VENV) demo work build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
