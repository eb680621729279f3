"""Experts of every form: transposed, interleaved, with biases or a gate of their own, one below the other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from core_models import MOE, same_state, write
from core_references import check_parts
from core_tiny import output_of, tiny_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

import quantport
from quantport import numerics
from quantport.errors import CheckpointError, RoutingError, SaveError
from quantport.kernels.base import WeightSpec
from quantport.modules import ExpertForm, QuantExperts, expert_form
from quantport.plugins.registry import default_registry

SCHEME = "int8_weight_only"
DBRX = {
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
}
CLASSES = {
    "GptOssForCausalLM": {},
    "Llama4ForCausalLM": {},
    "DbrxForCausalLM": DBRX,
    "DeepseekV4ForCausalLM": {},
    "AriaTextForCausalLM": {"num_key_value_heads": 4},
}
OF_SAVED = ["GptOssForCausalLM", "DbrxForCausalLM", "Llama4ForCausalLM"]


@pytest.fixture(params=CLASSES)
def saved(request, tmp_path):
    model = tiny_model(request.param, CLASSES[request.param])
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def experts_of(model):
    return next(m for m in model.modules() if isinstance(m, QuantExperts))


@pytest.mark.parametrize("scheme", ["fp8_per_block", "int4_weight_only_g32", "nf4"])
def test_every_form_is_quantized_as_its_matrices_are(scheme, saved):
    model = quantport.load(saved, scheme)
    plain = quantport.load(saved, "bf16")
    for name in experts_of(plain).specs:
        weight = experts_of(plain).stored_weight(name)["weight"]
        expected = numerics.quantize_weight(weight, default_registry().schemes[scheme])
        found = experts_of(model).stored_weight(name)
        assert all(
            torch.equal(found[key].view(torch.uint8), t.view(torch.uint8)) for key, t in expected.items()
        )


def test_every_form_is_saved_and_read_again(saved, tmp_path):
    model = quantport.load(saved, SCHEME)
    quantport.save(model, tmp_path / "quantized")
    again = quantport.load(tmp_path / "quantized")
    same_state(model, again)
    assert torch.equal(output_of(model), output_of(again))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(experts_of(model)))):
        assert experts_of(twin).form == experts_of(model).form
    assert torch.equal(output_of(copy.deepcopy(model)), output_of(model))


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "Llama4ForCausalLM", "DeepseekV4ForCausalLM"])
def test_every_form_compiles_to_what_it_is(name, tmp_path):
    tiny_model(name, CLASSES[name]).save_pretrained(tmp_path)
    experts = experts_of(quantport.load(tmp_path, SCHEME))
    x = torch.randn(8, experts.gate_up.k, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.arange(16).view(8, 2) * 3 % 4
    routing = () if experts.form.is_sorted else (index, torch.full((8, 2), 0.5, dtype=torch.bfloat16))
    with torch.no_grad():
        expected = experts(x, *routing)
        assert torch.equal(torch.compile(experts, backend="eager", fullgraph=True)(x, *routing), expected)
    if not experts.form.is_sorted:
        with pytest.raises(RoutingError) as caught:
            experts(x)
        check_parts(caught.value)


def test_biases_and_a_gate_as_gpt_oss_has_them():
    """By the formula of the model card, in fp32: interleaved, clamped, up plus one."""
    torch.manual_seed(0)
    kernel, scheme = default_registry().kernel("torch.linear"), default_registry().schemes["bf16"]

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 24))
            self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 24))
            self.down_proj = nn.Parameter(torch.randn(3, 12, 16))
            self.down_proj_bias = nn.Parameter(torch.randn(3, 16))
            self.is_concatenated = False

        def _apply_gate(self, x):
            gate, up = x[..., ::2].clamp(max=7), x[..., 1::2].clamp(-7, 7)
            return (up + 1) * gate * torch.sigmoid(gate * 1.702)

        def forward(self, x, index, weights):
            out = torch.zeros_like(x)
            for t, (experts, factors) in enumerate(zip(index, weights, strict=True)):
                for e, factor in zip(experts, factors, strict=True):
                    inner = self._apply_gate(x[t] @ self.gate_up_proj[e] + self.gate_up_proj_bias[e])
                    out[t] += factor * (inner @ self.down_proj[e] + self.down_proj_bias[e])
            return out

    module = Gpt()
    form = expert_form(module)
    assert isinstance(form, ExpertForm)
    biases = [module.get_parameter(name) for name in form.biases]
    quantized = QuantExperts(
        kernel, WeightSpec(scheme, 12, 16), WeightSpec(scheme, 16, 12), 3, form, torch.float32, biases=biases
    )
    for e in range(3):
        gate_up, down = module.gate_up_proj[e].detach().T, module.down_proj[e].detach().T
        quantized.set_weight(f"{e}.gate_proj", {"weight": gate_up[::2].bfloat16()})
        quantized.set_weight(f"{e}.up_proj", {"weight": gate_up[1::2].bfloat16()})
        quantized.set_weight(f"{e}.down_proj", {"weight": down.bfloat16()})
    with torch.no_grad():
        for parameter in (module.gate_up_proj, module.down_proj):
            parameter.copy_(parameter.bfloat16())
    x = torch.randn(5, 16, requires_grad=True)
    index, weights = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2]]), torch.rand(5, 2)
    expected, found = module(x, index, weights), quantized(x, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    (own,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-2)
    nowhere = torch.where(index == 2, -1, index)
    torch.testing.assert_close(
        quantized(x, nowhere, weights),
        module(x, index, torch.where(index == 2, 0, weights)),
        rtol=1e-5,
        atol=1e-4,
    )


class Stacks(nn.Module):
    """As the experts of Transformers, with what it is given besides."""

    def __init__(self, **further):
        super().__init__()
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.zeros(2, 8, 4)),
            nn.Parameter(torch.zeros(2, 4, 4)),
        )
        self.act_fn = SiLUActivation()
        for name, value in further.items():
            setattr(self, name, value)

    def forward(self, x, index, weights):
        return x


class Alone(Stacks):
    def forward(self, x):
        return x


class OwnTensor(Stacks):
    def _apply_gate(self, x):
        return x[:, ::2] * self.factor


class ReadsWeight(Stacks):
    def _apply_gate(self, x):
        return x[:, : self.gate_up_proj.shape[2]]


class NotHalf(Stacks):
    def _apply_gate(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (Stacks(has_post_expert_norm=True), "normalizes"),
        (Stacks(gate_up_proj_bias=nn.Parameter(torch.zeros(2, 8))), "alone"),
        (Stacks(scale=nn.Parameter(torch.ones(2))), "scale"),
        (Stacks(act_fn=nn.Tanh()), "Tanh"),
        (Alone(), "without a routing"),
        (OwnTensor(factor=nn.Buffer(torch.ones(1))), "tensors of its own"),
        (ReadsWeight(), "called alone"),
        (NotHalf(), "one column of two"),
        (nn.Linear(2, 2), "Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_known_form_says_why(module, word):
    assert word in expert_form(module)


@pytest.mark.parametrize(("intermediate", "hidden"), [(32, 32), (16, 32), (48, 32)])
def test_square_matrices_hide_no_transposition(intermediate, hidden, tmp_path):
    """GPT-OSS has as many hidden as intermediate columns."""
    model = tiny_model("GptOssForCausalLM", {"hidden_size": hidden, "intermediate_size": intermediate})
    model.save_pretrained(tmp_path)
    loaded = quantport.load(tmp_path, "bf16", model=lambda: type(model)(model.config))
    for name in ("1.gate_proj", "2.up_proj", "3.down_proj"):
        expert, projection = name.split(".")
        source = model.model.layers[0].mlp.experts
        stack = (
            source.down_proj
            if projection == "down_proj"
            else source.gate_up_proj[..., projection == "up_proj" :: 2]
        )
        assert torch.equal(experts_of(loaded).stored_weight(name)["weight"], stack[int(expert)].T)
    quantport.quantize_(model, SCHEME)
    assert experts_of(model).gate_up == quantport.load(tmp_path, SCHEME).model.layers[0].mlp.experts.gate_up


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """The MoE example with its experts fused, and the same with every matrix of them transposed."""
    tensors, folder = {}, tmp_path_factory.mktemp("turned")
    for file in sorted(MOE.glob("*.safetensors")):
        tensors |= load_file(file)
    fused = {name: t for name, t in tensors.items() if ".experts." not in name}
    for base in {name[: name.index(".experts.")] for name in tensors if ".experts." in name}:
        count = len({n.split(".")[5] for n in tensors if n.startswith(f"{base}.experts.")})
        gate, up, down = (
            torch.stack([tensors[f"{base}.experts.{e}.{p}_proj.weight"] for e in range(count)])
            for p in ("gate", "up", "down")
        )
        fused |= {f"{base}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{base}.experts.down_proj": down}
    config = (MOE / "config.json").read_text()
    write(folder / "fused", fused, config__json=config)
    other = {n: t.mT.contiguous() if ".experts." in n else t for n, t in fused.items()}
    return write(folder / "fused", fused, config__json=config), write(
        folder / "turned", other, config__json=config
    )


@pytest.mark.parametrize(
    "config", [{"scheme": SCHEME}, {"scheme": SCHEME, "moe": None}], ids=["int8", "kept"]
)
def test_a_file_may_hold_stacks_transposed_that_the_model_does_not(config, turned):
    fused, other = (quantport.load(folder, config=config) for folder in turned)
    same_state(fused, other)


@pytest.mark.filterwarnings("ignore:.*of the bytes of matrices are quantized:UserWarning")
def test_stacks_of_neither_orientation_are_refused(turned, tmp_path):
    tensors = load_file(turned[0] / "model.safetensors")
    for name in [name for name in tensors if name.endswith("experts.down_proj")]:
        tensors[name] = tensors[name][:, :-8].contiguous()
    folder = write(tmp_path / "broken", tensors, config__json=(MOE / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        quantport.load(folder, SCHEME)
    check_parts(caught.value)


@pytest.mark.parametrize(
    "name", [*OF_SAVED, "MixtralForCausalLM", "GraniteMoeForCausalLM", "AriaTextForCausalLM"]
)
def test_experts_that_others_store_otherwise_are_not_written_for_them(name, tmp_path):
    """Transformers would leave such names out with a warning, and draw the experts at random."""
    model = tiny_model(name, CLASSES.get(name))
    quantport.quantize_(model, SCHEME)
    for format_name in ("compressed-tensors", "modelopt"):
        with pytest.raises(SaveError, match="no checkpoint of this architecture") as caught:
            quantport.save(model, tmp_path / "out", format=format_name)
        check_parts(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_rows_that_take_turns_with_a_plain_activation(activation):
    form = ExpertForm(activation, interleaved=True, biases=("gate_up_proj_bias", "down_proj_bias"))
    gate, up, bias = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 8)
    experts = torch.tensor([1, 0, 1])
    functions = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    expected = functions[activation](gate + bias[experts, ::2]) * (up + bias[experts, 1::2])
    found = form.between(torch.cat([gate, up], 1), [bias, bias], experts)
    torch.testing.assert_close(found, expected)
