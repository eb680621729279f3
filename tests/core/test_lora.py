"""LoRA adapters of PEFT on quantized layers, with nothing to register: a QuantLinear is an nn.Linear."""

from __future__ import annotations

import warnings

import pytest
import torch
from core_models import DENSE, MOE, ids
from core_references import check_parts

import quantport
from quantport.errors import NoTensorError
from quantport.modules import QuantLinear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT imports whatever quantization library is installed, and those warn
    import peft

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def adapted(path=DENSE, scheme="int8", targets=("q_proj", "v_proj", "down_proj"), **options):
    model = quantport.load(path, scheme)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=list(targets), r=4, lora_alpha=8, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(model, config)


def close(found, expected):
    """Equal but for the last bits: experts with gradients run one by one, without them in one launch."""
    return (found - expected).abs().max() <= 2**-6 * expected.abs().max()


def train(model, steps=4):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=3e-3), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("path", "scheme", "targets"),
    [
        (DENSE, "int8", ("q_proj", "v_proj", "down_proj")),
        (DENSE, "int4_weight_only", "all-linear"),
        (DENSE, "fp8_per_block", ("q_proj",)),
        (MOE, "int8", ("q_proj", "o_proj")),
    ],
    ids=str,
)
def test_training_lowers_the_loss_and_touches_only_the_adapter(path, scheme, targets):
    model = quantport.load(path, scheme)
    before, plain = {n: t.clone() for n, t in model.state_dict().items()}, model(ids).logits
    torch.manual_seed(0)
    targets = targets if isinstance(targets, str) else list(targets)
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, task_type="CAUSAL_LM")
    )
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert close(model(ids).logits, plain)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.3, losses
    with model.disable_adapter():
        assert close(model(ids).logits, plain)
    assert not close(model(ids).logits, plain)
    back = model.unload()
    assert all(
        torch.equal(before[n].view(torch.uint8), t.view(torch.uint8)) for n, t in back.state_dict().items()
    )


def test_the_gradient_reaches_the_first_layer():
    """Through every quantized layer above it: not by the residual path alone."""
    model = adapted(targets=("q_proj",), layers_to_transform=[0])
    frozen = quantport.load(DENSE, "bf16")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["q_proj"], layers_to_transform=[0], r=4, lora_alpha=8, task_type="CAUSAL_LM"
    )
    reference = peft.get_peft_model(frozen.float(), config)
    found = []
    for m in (model, reference):
        m(input_ids=ids, labels=ids).loss.backward()
        (grad,) = (p.grad.float() for n, p in m.named_parameters() if "lora_B" in n)
        found.append(grad)
    assert torch.nn.functional.cosine_similarity(found[0].flatten(), found[1].flatten(), 0) > 0.95


def test_an_adapter_is_saved_and_loaded(tmp_path):
    model = adapted()
    train(model, 2)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 300_000
    again = peft.PeftModel.from_pretrained(quantport.load(DENSE, "int8"), tmp_path)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert again.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 16)


def test_gradient_checkpointing():
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    assert train(model, 2)[1] > 0


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "safe"])
def test_merging_is_refused_and_changes_nothing(how):
    model = adapted()
    train(model, 1)
    expected = model(ids).logits
    with pytest.raises(NoTensorError) as caught:
        model.merge_and_unload(safe_merge=True) if how == "safe" else getattr(model, how)()
    check_parts(caught.value, "weight.data", "16-bit model")
    assert torch.equal(model(ids).logits, expected)


def test_layers_are_found_by_class():
    model = adapted(targets=["gate_proj"])
    bases = [m.base_layer for m in model.modules() if hasattr(m, "lora_A")]
    assert len(bases) == 6
    assert all(isinstance(b, QuantLinear) for b in bases)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"use_dora": True}, TypeError),  # PEFT itself refuses what is no parameter
        ({"init_lora_weights": "pissa"}, NoTensorError),
        ({"init_lora_weights": "olora"}, NoTensorError),
    ],
    ids=str,
)
def test_what_needs_the_weight_itself_fails(options, error):
    with pytest.raises(error, match="weight"):
        adapted(**options)
