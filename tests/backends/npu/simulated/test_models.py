"""Both example models on a simulated NPU, from the checkpoint to the text, against the reference on the CPU."""

from simulator.need import simulated

simulated("A2", "950")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from simulator import register  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import quantport  # noqa: E402

MODELS = Path(__file__).parents[4] / "examples" / "models"
PROMPT = "The old man went to the sea and"
BUDGET = 16 << 20
TOLERANCE = 2.0**-3  # through all layers; of one product it is that of the kernel
FOUR = 2.0**-2  # of 4-bit activations: what moves by a rounding to 16 bits may move by a whole code in the next layer
ON_A2 = {
    "int8": "npu.quant_matmul",
    "int8_weight_only": "npu.weight_quant_int8",
    "int4_weight_only": "npu.weight_quant_int4",
}
ON_950 = {
    "fp8": "npu.quant_matmul_fp8",
    "fp8_per_block": "npu.quant_matmul_fp8_blocks",
    "mxfp8": "npu.quant_matmul_mxfp8",
    "mxfp4": "npu.quant_matmul_mxfp4",
    "mxfp4_w4a8": "npu.quant_matmul_mxfp4_w4a8",
    "mxfp4_dualscale": "npu.dual_level_quant_matmul",
}
HERE = ON_A2 if register.family() == "A2" else ON_950


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen3-moe"])
def model(request):
    return MODELS / request.param


@pytest.mark.parametrize("scheme", HERE)
def test_a_model_runs_as_the_reference_says(model, scheme):
    """Tokens are compared where the logits leave no doubt: a near tie may go either way."""
    ids = AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt").input_ids
    torch.npu.empty_cache()
    before = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    here = quantport.load(model, scheme, device="npu", budget=BUDGET)
    kept = torch.npu.memory_allocated() - before
    assert torch.npu.max_memory_allocated() - before <= kept + BUDGET
    assert {step.choice.kernel for step in here.quantport_plan.steps if step.choice} == {HERE[scheme]}
    there = quantport.load(model, scheme, device="cpu", budget=BUDGET)
    register.CALLS.clear()
    with torch.no_grad():
        expected = there.generate(ids, max_new_tokens=12, do_sample=False)
        text = here.generate(ids.to("npu"), max_new_tokens=12, do_sample=False).cpu()
        logits, wanted = here(expected.to("npu")).logits[0].float().cpu(), there(expected).logits[0].float()
    assert register.CALLS
    assert text.shape[1] > ids.shape[1]
    largest = float(wanted.abs().max())
    error = float((logits - wanted).abs().max()) / largest
    assert error <= (FOUR if scheme in ("mxfp4", "mxfp4_dualscale") else TOLERANCE)
    top, second = wanted.topk(2, -1).values.unbind(-1)
    clear = top - second > 2 * error * largest  # errors of two logits cannot exchange them
    assert (logits.argmax(-1) == wanted.argmax(-1))[clear].all()
