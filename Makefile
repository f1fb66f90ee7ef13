# The Python of .venv: 3.10 to 3.12.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := model/api/requirements.txt model/api/requirements-torch.txt

# Triton for development and tests. npair uses the server inside and none of the Python packages that the wheel asks for.
SERVER := nvidia-pytriton==0.7.0

# PyPI's torch brings gigabytes of CUDA; PyTorch's CPU index has a smaller build of the same version, and pip prefers it (2.13.0+cpu is
# newer than 2.13.0). On a closed network that index is given up after two tries, and torch comes from what pip is configured with.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help install serve test lint format clean

help: ## List these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/serve: $(PINS)
	@$(PYTHON) model/api/serve.py --check
	$(PYTHON) -m venv .venv
	$(PIP) install --no-deps --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) "$$(grep -h '^torch==' $(PINS))"
	$(PIP) install $(PINS:%=-r %)
	$(PIP) install --no-deps $(SERVER)
	@touch $@

.venv/dev: .venv/serve pyproject.toml
	$(PIP) install $(PINS:%=-r %) --editable '.[dev]'
	@touch $@

install: .venv/dev ## Prepare .venv for training, tests and serving

serve: .venv/serve ## Start Triton with model_repository/ (HTTP_PORT, GRPC_PORT, METRICS_PORT, BIND_ADDRESS)
	@exec $(BIN)/python model/api/serve.py

test: .venv/dev ## Run all tests, on a real server
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv and what tools cache
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
