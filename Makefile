# What a newcomer types. Everything is built once, in release: the kernels are too slow to be tested otherwise, and the
# demo, the tests and the benchmarks then share one set of artefacts.

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench binaries docker-test

CARGO ?= cargo
# Tests that start meshes of several processes are patient, but not without bound: few at once.
TEST_THREADS ?= 2
# What whole meshes are measured on.
MODEL ?= target/bench-model

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

binaries:
	$(CARGO) build --release --workspace --bins

demo: binaries ## Start a mesh of seven processes on the shipped tiny model, stream a completion, measure it, stop it
	target/release/meshctl demo

test: ## Set up what the tests need, then run all of them
	scripts/setup-test-deps.sh
	scripts/test.sh $(TEST_THREADS)

docker-test: binaries ## Run a mesh of containers on this machine's Docker engine, scale it, check its answers
	docker/test.sh

lint: ## Formatting, clippy with warnings denied, documentation, tidiness
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --workspace --no-deps --quiet
	scripts/tidy.sh

bench: binaries ## Kernels, exchange and (MODEL=DIR, or target/bench-model) whole meshes, beside the machine's limits
	target/release/mesh-bench kernels --json target/bench/kernels.json
	target/release/mesh-bench exchange --json target/bench/exchange.json
	@if [ "$(origin MODEL)" != file ] || [ -f "$(MODEL)/config.json" ]; then \
	  target/release/mesh-bench mesh --model "$(MODEL)" --json target/bench/mesh.json; \
	else \
	  echo "no whole meshes without a model: target/release/mesh-bench model --out $(MODEL)   (2.6 GB), or MODEL=DIR"; \
	fi
