# One target for each intent; the same for people and for CI.
.PHONY: setup check test nightly demo build bench gpu npu docs models clean

setup: ; @ci/setup
check: setup ; @ci/check
test: setup ; @ci/test
nightly: setup ; @ci/nightly
demo: setup ; @ci/demo
build: setup ; @ci/build
bench: setup ; @ci/bench
gpu: ; @ci/gpu
npu: ; @ci/npu
docs: setup ; @ci/docs
models: setup ; @ci/models
clean: ; @rm -rf .venv .venv-npu dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
