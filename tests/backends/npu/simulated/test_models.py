"""Both example models on a simulated NPU, from the checkpoint to the text, against the reference of every
layer on the CPU.

The reference is that of the scheme with the deviations that each kernel declares (``declared.py``). Every
product must be within the tolerance of its kernel on the activations that it really got, and so must the
logits after all layers.
"""

from simulator.need import simulated

simulated("A2", "950")

from pathlib import Path

import declared
import pytest
import torch
from simulator import register
from simulator.start import DRIVER
from transformers import AutoTokenizer

import quantport
from quantport.modules import QuantExperts

MODELS = Path(__file__).parents[4] / "examples" / "models"
# From documentation of Python, on which the models were trained; the BF16 logits are far apart here.
PROMPTS = (
    'If the syntax "*expression" appears in the function call, "expression"',
    "A *future statement* is a directive to the compiler that",
    "right, to the targets before the starred target. The final",
)
TOKENS = 12
BUDGET = 16 << 20
SEGMENT = 20 << 20  # torch_npu asks the driver for so much at a time
TOLERANCE = 2.0**-6  # of every kernel of the room
ROUNDED = 2.0**-8  # logits are bf16 on both sides
ON_A2 = {
    "int8": {"npu.quant_matmul", "npu.grouped_matmul"},
    "int8_weight_only": {"npu.weight_quant_int8", "npu.grouped_weight_int8"},
    "int4_weight_only": {"npu.weight_quant_int4", "npu.grouped_weight_int4"},
}
ON_950 = {
    "int8": {"npu.quant_matmul", "npu.grouped_matmul"},
    "fp8": {"npu.quant_matmul_fp8", "npu.grouped_matmul_fp8"},
    "fp8_per_block": {"npu.quant_matmul_fp8_blocks"},
    "mxfp8": {"npu.quant_matmul_mxfp8", "npu.grouped_matmul_mxfp8"},
    "mxfp4": {"npu.quant_matmul_mxfp4", "npu.grouped_matmul_mxfp4"},
    "mxfp4_w4a8": {"npu.quant_matmul_mxfp4_w4a8"},
    "mxfp4_dualscale": {"npu.dual_level_quant_matmul"},
}
IN_DOUBT = ("fp8_per_block",)  # a router of the MoE model is, for one token of the prompt
HERE = ON_A2 if register.family() == "A2" else ON_950


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen3-moe"])
def model(request):
    return MODELS / request.param


def generate(model, ids):
    """Greedy text and its logits."""
    with torch.no_grad():
        text = model.generate(ids, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False)
        return text, model(text).logits[0].float().cpu()


def same_routes(here, there, text):
    """Number of tokens that go to the same experts in every layer of both models, before the first that does
    not.

    Rounding decides where a router is undecided between two experts, and what follows cannot be compared.
    """
    seen = [], []
    for model, notes in zip((here, there), seen, strict=True):
        for module in (m for m in model.modules() if isinstance(m, QuantExperts)):
            module.register_forward_pre_hook(
                lambda _, given, notes=notes: notes.append(given[1].cpu().sort(-1).values)
            )
        with torch.no_grad():
            model(text.to(model.device))
    differs = (
        torch.stack([(a != b).any(-1) for a, b in zip(*seen, strict=True)]).any(0)
        if seen[0]
        else torch.zeros(text.shape[1])
    )
    return int(differs.nonzero()[0]) if differs.any() else text.shape[1]


def clearest(model, tokenizer):
    """The answer of the reference to the prompt about which it is most certain: near ties in the others may
    go either way.
    """
    said = [
        (ids, *generate(model, ids)) for ids in (tokenizer(p, return_tensors="pt").input_ids for p in PROMPTS)
    ]

    def doubt(ids, text, logits):
        top = logits[ids.shape[1] - 1 : -1].topk(2, -1).values
        return -(top[:, 0] - top[:, 1]).min().item()

    return min(said, key=lambda s: doubt(*s))


def own(model):
    """Bytes of a model's tensors as torch_npu allocates them: 32 more for each, in units of 512."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    return sum(-(-(size + 32) // 512) * 512 for size in storages.values())


def load(model, scheme):
    """Loads onto the NPU, and checks against the budget what torch_npu counts and what it asks the driver
    for.
    """
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    DRIVER.simulated_reset_peak()
    before, held = torch.npu.memory_allocated(), DRIVER.simulated_used()
    made = quantport.load(model, scheme, device="npu", budget=BUDGET)
    limit = own(made) + BUDGET
    assert torch.npu.max_memory_allocated() - before <= limit
    assert DRIVER.simulated_peak() - held <= limit + 2 * SEGMENT
    return made


@pytest.mark.parametrize("scheme", HERE)
def test_a_model_runs_as_the_reference_says(model, scheme):
    here = load(model, scheme)
    used = {step.choice.kernel for step in here.quantport_plan.steps if step.choice}
    assert used
    assert used <= HERE[scheme]
    there = quantport.load(model, scheme, device="cpu", budget=BUDGET, fallback="reference")
    declared.as_declared(there, here)
    ids, expected, wanted = clearest(there, AutoTokenizer.from_pretrained(model))
    register.CALLS.clear()
    text, logits = generate(here, ids.to("npu"))
    assert set(register.CALLS) & {
        "npu_quant_matmul",
        "npu_weight_quant_batchmatmul",
        "npu_dual_level_quant_matmul",
    }
    assert text.shape[1] == ids.shape[1] + TOKENS
    assert torch.equal(text.cpu(), expected)
    same = same_routes(here, there, expected)
    assert same == text.shape[1] or scheme in IN_DOUBT
    assert (logits - wanted)[:same].abs().max() <= (TOLERANCE + ROUNDED) * wanted.abs().max()
    checked = declared.check_each(here)
    generate(here, ids.to("npu"))
    assert all(
        kernel.errors and max(kernel.errors) <= kernel.kernel.tolerance <= TOLERANCE for kernel in checked
    )
