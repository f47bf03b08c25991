# The only commands there are. `make help` lists them.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STUBS   := clients/python
PROTOC  := .venv-proto/bin/python -m grpc_tools.protoc -I proto
PORT    ?= 8001
METRICS ?= 8002

.DEFAULT_GOAL := help
.PHONY: help setup models serve test check fmt proto stale-stubs image clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | column -t -s '|'

$(VENV)/.ready: pyproject.toml clients/python/pyproject.toml
	@echo "Making the environment in $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e clients/python -e ".[cpu,export,dev]"
	@touch $@

setup: $(VENV)/.ready ## Make the environment

models: setup ## Train and export the starter models that are missing
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m export starter

serve: models ## Serve the starter models (gRPC on 8001, metrics on 8002)
	@$(BIN)/python -m server --models models --port $(PORT) --metrics-port $(METRICS)

test: setup ## Run the whole test suite
	$(BIN)/python -m pytest

check: setup stale-stubs ## Format, lint, types, layers, contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

fmt: setup ## Format everything
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format -w

.venv-proto/.ready: proto/requirements.txt
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

proto: .venv-proto/.ready ## Generate the stubs from proto/
	find $(STUBS)/samovar/v1 -name '*_pb2*' -delete
	. .venv-proto/bin/activate && $(PROTOC) --python_out=$(STUBS) --mypy_out=$(STUBS) proto/samovar/v1/*.proto
	. .venv-proto/bin/activate && $(PROTOC) --grpc_python_out=$(STUBS) --mypy_grpc_out=$(STUBS) proto/samovar/v1/inference.proto

stale-stubs: proto
	@git diff --exit-code --stat -- $(STUBS)/samovar/v1 || { echo "The stubs are stale: commit what 'make proto' made."; exit 1; }
	@test -z "$$(git ls-files --others --exclude-standard -- $(STUBS)/samovar/v1)" || { echo "Stubs that git does not know: add what 'make proto' made."; exit 1; }

image: ## Build the server's container image
	docker build -t samovar .

clean: ## Remove environments and caches; models stay
	rm -rf $(VENV) .venv-proto .mypy_cache .ruff_cache .pytest_cache .hypothesis
