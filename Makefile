# One target for each intent; the same for people and for CI.
.PHONY: setup check test cpu nightly demo build bench decode llama quality gpu npu ipex loaders docs models clean

setup: ; @ci/setup
check: setup ; @ci/check
test: setup ; @ci/test
cpu: setup ; @ci/cpu
nightly: setup ; @ci/nightly
demo: setup ; @ci/demo
build: setup ; @ci/build
bench: setup ; @ci/bench
decode: setup ; @ci/decode
llama: setup ; @ci/llama
quality: setup ; @ci/quality
gpu: ; @ci/gpu
npu: ; @ci/npu
ipex: ; @ci/ipex
loaders: setup ; @ci/loaders
docs: setup ; @ci/docs
models: setup ; @ci/models
clean: ; @rm -rf .venv .venv-npu .venv-ipex .venv-llama .venv-openvino .venv-vllm .venv-gptqmodel dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
