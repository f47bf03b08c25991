# All commands of the project. `make help` lists them.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STUBS   := clients/python
PROTOC  := .venv-proto/bin/python -m grpc_tools.protoc -I proto
PORT    ?= 8001
METRICS ?= 8002
# onnxruntime or onnxruntime-gpu
DEVICE  := $(if $(shell command -v nvidia-smi),gpu,cpu)
# Number of processes that run tests
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup models serve test bench gpu-bundle gpu-check gpu-rehearsal check prose fmt proto stale-stubs image clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | column -t -s '|'

$(VENV)/.ready: pyproject.toml clients/python/pyproject.toml
	@echo "Creating the environment in $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e clients/python -e ".[$(DEVICE),export,dev]"
	@touch $@

setup: $(VENV)/.ready ## Create the environment

models: setup ## Train and export the starter models that are missing
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m export train-starters

serve: models ## Serve the starter models (gRPC on 8001, metrics on 8002)
	@$(BIN)/python -m server --models models --port $(PORT) --metrics-port $(METRICS)

test: setup ## Run all tests; FAST=1 skips those that need artifacts of the families: servers, contracts, commands
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(if $(FAST),-m "not slow") $(PYTEST)

bench: setup ## Measure speed and write docs/benchmarks.md, in minutes; QUICK=1 for rough figures
	@$(BIN)/python -m benchmarks $(if $(QUICK),--quick,--docs docs)

gpu-bundle: setup ## Make what a GPU machine without network needs for gpu-check; ONNX=1 for ONNX Runtime too
	$(BIN)/python -m benchmarks.gpu.bundle $(if $(ONNX),--onnxruntime)

gpu-check: ## On the GPU machine: prove and measure everything on CUDA, in minutes (docs/gpu.md)
	@benchmarks/gpu/check.sh $(GPU)

gpu-rehearsal: ## Run gpu-check on the CPU of this machine, in a new Python 3.12 without network
	@benchmarks/gpu/rehearse.sh

check: setup prose stale-stubs ## Check format, lint, types, layers, contracts and prose
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

# The guide and the changelog quote banned words; the stubs are generated.
PROSE := '*.py' '*.md' '*.proto' '*.html' '*.toml' Makefile Dockerfile .ci/run \
	':!CONTRIBUTING.md' ':!CHANGELOG.md' ':!*_pb2*'

prose: ## Search for the words that the style guide bans, listed in .ci/banned-words
	@git grep --untracked -nwiE -f .ci/banned-words -- $(PROSE); [ $$? = 1 ] || \
		{ echo "These lines contain words of .ci/banned-words; see Style in CONTRIBUTING.md."; exit 1; }

fmt: setup ## Format everything
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format -w

.venv-proto/.ready: proto/requirements.txt
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

# Generate all stubs in the directory $(1).
define stubs
. .venv-proto/bin/activate && $(PROTOC) --python_out=$(1) --mypy_out=quiet:$(1) proto/samovar/v1/*.proto
. .venv-proto/bin/activate && $(PROTOC) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) proto/samovar/v1/inference.proto
endef

proto: .venv-proto/.ready ## Generate the stubs from proto/
	find $(STUBS)/samovar/v1 -name '*_pb2*' -delete
	@$(call stubs,$(STUBS))

stale-stubs: .venv-proto/.ready
	@rm -rf build/stubs && mkdir -p build/stubs
	@$(call stubs,build/stubs)
	@diff -r -x __init__.py -x __pycache__ build/stubs/samovar/v1 $(STUBS)/samovar/v1 > /dev/null || \
		{ echo "The stubs are stale: run 'make proto' and commit its output."; exit 1; }

image: ## Build the server's container image
	docker build -t samovar .

clean: ## Remove environments and caches, but no models
	rm -rf $(VENV) .venv-proto .mypy_cache .ruff_cache .pytest_cache .hypothesis build/stubs build/test-artifacts
