# Each target makes the virtual environment that it needs, once; that takes python3 with venv and a package index.
#
# What they cost, on two cores:
#   make demo    installs torch and Transformers; then 15 seconds
#   make docs    installs the documentation's tools besides; then half a minute
#   make test    installs everything for development; then 6 to 10 minutes
# PyTorch is the largest part: for Linux, the usual build brings CUDA, 3 GB to download and 6 GB on the disk. Its start page
# says how to install the build for the CPU, which is much smaller.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
IMAGE ?=
LABELS ?=
# Processes that run tests side by side, each in one thread.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo node test test-all test-rest lint mlint types docs pytest pytest-slow pytest-exhaustive pytest-oldest embedded embedded-code clean

# Names eight drawings with the embedded model, and writes demo.png; IMAGE=path LABELS="a cat,a dog" for your own.
demo: $(VENV)/.demo-ready
	$(VENV)/bin/python embedded/demo.py $(if $(IMAGE),--image "$(IMAGE)") $(if $(LABELS),--labels "$(LABELS)")

# What a commit is tested with.
test: lint types docs pytest

test-all: test test-rest

# What `make test` leaves out.
test-rest: pytest-slow pytest-oldest

lint: $(VENV)/.dev-ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# What Transformers' linter of model code says of the files that travel. Two rules are left out: TRF028 asks for a
# licence's text in each file, which LICENSE and the model card have; TRF057 for @auto_docstring, which would write over
# docstrings that are whole.
mlint: $(VENV)/.dev-ready
	$(VENV)/bin/pip install --quiet transformers-mlinter
	! COLUMNS=1000 $(VENV)/bin/mlinter --no-progress --no-cache --github-annotations src/diffclip_hf 2>&1 \
		| grep ::error | grep -v -e TRF028 -e TRF057

types: $(VENV)/.dev-ready
	$(VENV)/bin/mypy

# The documentation, into build/site; a warning is an error.
docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

pytest: $(VENV)/.dev-ready
	$(VENV)/bin/python $(PYTEST) --cov --cov-report=term

# The web demo's page is tested where Debian's chromium and chromium-driver are installed.
pytest-slow: $(VENV)/.dev-ready
	$(VENV)/bin/python $(PYTEST) -m "slow and not exhaustive"

# transformers.js, by which Node and the browser are tested on what the ONNX export writes; 43 packages, 480 MB.
node: build/node/.ready

build/node/.ready: tests/package.json
	mkdir -p build/node
	cp tests/package.json build/node/
	npm install --prefix build/node --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@

# Every other pair of card and dtype for which the kernels compile; six minutes of a processor.
pytest-exhaustive: $(VENV)/.dev-ready
	$(VENV)/bin/python $(PYTEST) -m exhaustive

# The lower bounds of transformers and torch, without torchvision and Gradio.
pytest-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python $(PYTEST)

# Trains the embedded model anew, on scenes, in three runs, and measures it on the held-out vendor; 80 minutes on two cores.
embedded: $(VENV)/.dev-ready
	$(VENV)/bin/python embedded/train.py --output-dir build/embedded-1 --cache-dir .cache/embedded
	$(VENV)/bin/python embedded/train.py --output-dir build/embedded-2 --cache-dir .cache/embedded \
		--start-from build/embedded-1 --epochs 130 --learning-rate 7e-4 --decay 0.7 --seed 1
	$(VENV)/bin/python embedded/train.py --output-dir build/embedded --cache-dir .cache/embedded \
		--start-from build/embedded-2 --epochs 230 --learning-rate 7e-4 --decay 0.7 --seed 2
	$(VENV)/bin/python embedded/evaluate.py --model build/embedded --cache-dir .cache/embedded

# The embedded model's copies of the code that travels, after a change to it; a test compares them.
embedded-code: $(VENV)/.dev-ready
	$(VENV)/bin/python -c "import diffclip_hf; diffclip_hf.add_remote_code('embedded/diffclip-emoji')"

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-ready: pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet torch torchvision
	$(VENV)/bin/pip install --quiet --editable '.[torchvision,plotting]'
	touch $@

$(VENV)/.docs-ready: pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.dev-ready: pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet torch torchvision
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo-ready $(VENV)/.docs-ready

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet torch==2.13.0 transformers==5.18.0
	$(OLDEST)/bin/pip install --quiet --editable '.[test]'
	# Only its vocabulary file is read, so none of what it depends on is needed.
	$(OLDEST)/bin/pip install --quiet --no-deps clip-anytorch
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build .cache demo.png
