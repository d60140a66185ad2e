# Each target builds what it needs. PYTHON picks the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart photos cifar10 test parity lint test-tfds clean

quickstart: $(VENV)/.ready  ## transfer a shipped MNIST network to other people's digits, 5 labels a class
	$(BIN)/python launch.py --mode=sweep --config=configs/quickstart.py --workdir=runs/quickstart

# xdist would begin with the files of most tests; the slow runs that are killed, few tests, then end alone on one core.
test: $(VENV)/.ready  ## the fast tests, on every core up to four
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

photos: $(VENV)/.ready  ## ImageNet MobileNetV2 to ants and bees; needs ../shared
	mkdir -p runs/hymenoptera && tar -xf ../shared/data/hymenoptera.tar -C runs/hymenoptera
	$(BIN)/python launch.py --mode=sweep --config=configs/finetune.py --workdir=runs/photos

cifar10: $(VENV)/.ready  ## CIFAR-10 as runs/cifar10.npz, from ../shared
	$(BIN)/python -m experiments.cifar10

test-tfds: $(VENV)/.ready .venv-tfds/.ready  ## TFDS prepares a set with TensorFlow; we read it without
	TFDS_PYTHON=.venv-tfds/bin/python $(BIN)/python -m pytest tests/tfds

parity: .venv-parity/.ready  ## our networks, adapters and distillation terms beside torch's, the same numbers in both
	.venv-parity/bin/python -m pytest tests/parity/live_parity.py tests/parity/live_sizes.py tests/parity/live_generate.py tests/parity/live_peft.py \
		tests/parity/live_distillation.py

lint: $(VENV)/.ready
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

$(VENV)/.ready: requirements.txt requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

.venv-tfds/.ready: requirements-tfds.txt
	$(PYTHON) -m venv .venv-tfds
	.venv-tfds/bin/python -m pip install -q --disable-pip-version-check -r requirements-tfds.txt
	touch $@

# torchvision would ask for a torch of its own kind; only its Python is needed here.
.venv-parity/.ready: requirements.txt requirements-dev.txt requirements-parity.txt
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	.venv-parity/bin/python -m pip install -q --disable-pip-version-check -r requirements-parity.txt \
		--extra-index-url https://download.pytorch.org/whl/cpu
	.venv-parity/bin/python -m pip install -q --disable-pip-version-check --no-deps torchvision==0.28.0 timm==1.0.31
	touch $@

clean:
	rm -rf $(VENV) .venv-tfds .venv-parity .jax_cache build *.egg-info
