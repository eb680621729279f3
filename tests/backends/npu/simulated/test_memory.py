"""Loads a model many times larger than the budget onto a simulated NPU: memory never exceeds the quantized
model plus the budget.
"""

from simulator.need import simulated

simulated("A2", "950")

import gc

import pytest
import torch
from simulator import register
from simulator.start import DRIVER
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import quantport

BUDGET = 30 << 20
SEGMENT = 20 << 20  # torch_npu asks the driver for so much at a time, and splits it
SCHEMES = {"A2": ("int8", "int4_weight_only"), "950": ("fp8", "mxfp8", "mxfp4")}[register.family()]


def own(model):
    """Bytes of a model's tensors as torch_npu allocates them: 32 more for each, in units of 512."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
        if t.numel()
    }
    return sum(-(-(size + 32) // 512) * 512 for size in storages.values())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 220 MB in BF16: linear layers and experts."""
    where = tmp_path_factory.mktemp("large")
    config = Qwen3MoeConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=1024,
        vocab_size=1024,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    model.save_pretrained(where, max_shard_size="60MB")
    return where, sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_peak_is_the_quantized_model_and_the_budget(large, scheme):
    where, full = large
    gc.collect()  # the model of the scheme before
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    DRIVER.simulated_reset_peak()
    before, held = torch.npu.memory_allocated(), DRIVER.simulated_used()
    model = quantport.load(where, scheme, device="npu", budget=BUDGET)
    kept, peak, asked = own(model), torch.npu.max_memory_allocated() - before, DRIVER.simulated_peak() - held
    assert full > 200e6
    assert full > 6 * BUDGET
    assert kept < 0.6 * full
    assert kept <= peak <= kept + BUDGET
    assert asked <= kept + BUDGET + 2 * SEGMENT
    assert kept <= torch.npu.memory_allocated() - before <= 1.05 * kept
    assert model(torch.zeros(1, 3, dtype=torch.long, device="npu")).logits.isfinite().all()
