"""What vLLM-Omni's users can quantize online on which device, and tiny diffusion transformers to show that it
works here.

The table: vllm-project/vllm-omni ``docs/user_guide/quantization/online.md``, the rows of Intel XPU and of
Ascend NPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

YES, NO, UNVERIFIED = True, False, None  # the guide's marks; what it does not verify, it does not promise
TABLE = {
    "xpu": {"fp8": UNVERIFIED, "int8": UNVERIFIED, "mxfp8": YES, "mxfp4": UNVERIFIED},
    "npu": {"fp8": NO, "int8": YES, "mxfp8": YES, "mxfp4": YES},
}
HEADS, WIDTH, WORDS, SIDE = 4, 64, 7, 4  # four heads of 64; 7 words of text; 4 x 4 patches of an image
TOKENS = SIDE * SIDE
TEXT = 96  # features of a word: fewer than a group of 128


class Dit(nn.Module):
    """One block of a diffusion transformer (Peebles and Xie, "Scalable Diffusion Models with Transformers")
    with a text stream.

    Image and words attend to each other; shift, scale and gate follow from the time step.
    """

    def __init__(self, features: int = 16, hidden: int = HEADS * WIDTH) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(features, hidden), nn.Linear(TEXT, hidden)
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.out = nn.Linear(hidden, features)

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        """Noise ``[batch, tokens, features]`` in the image, with ``text`` ``[batch, words, TEXT]``, at
        ``time`` ``[batch]``.
        """
        x = torch.cat((self.image(image), self.text(text)), 1)
        angles = time[:, None] * torch.logspace(0, -4, x.shape[-1] // 2, device=x.device)
        steps = self.modulation(torch.cat((angles.cos(), angles.sin()), -1).to(x.dtype))
        shift, scale, gate, shift2, scale2, gate2 = steps[:, None].chunk(6, -1)
        heads = (
            self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        q, k, v = heads.unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        x = x + gate * self.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + gate2 * self.down(nn.functional.gelu(self.up(self.norm(x) * (1 + scale2) + shift2)))
        return self.out(x[:, : image.shape[1]])


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )


def _qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT,
        axes_dims_rope=(16, 24, 24),
    )


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        ffn_dim=512,
        num_layers=1,
    )


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "dit": Dit,
    "flux": _flux,
    "qwen_image": _qwen_image,
    "wan": _wan,
}
DIFFUSERS = tuple(name for name in FACTORIES if name != "dit")  # architectures of the package diffusers


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A diffusion transformer with random weights on the host, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FACTORIES[name]()
        for parameter in model.parameters():  # gates start at 0 or near it: everything should have a say
            nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval()


def given(name: str, where: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The arguments with which ``step`` calls the model: one image, one prompt."""
    made = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made).to(dtype).to(where)

    tokens, text, time = noise(1, TOKENS, 16), noise(1, WORDS, TEXT), torch.tensor([0.5], device=where)
    if name == "dit":
        return {"image": tokens, "text": text, "time": time}
    if name == "wan":
        latent = noise(1, 4, 1, 2 * SIDE, 2 * SIDE)
        return {"hidden_states": latent, "encoder_hidden_states": text, "timestep": time * 1000}
    out = {"hidden_states": tokens, "encoder_hidden_states": text, "timestep": time.to(dtype)}
    if name == "qwen_image":
        mask = torch.ones(1, WORDS, dtype=torch.bool, device=where)
        return {**out, "encoder_hidden_states_mask": mask, "img_shapes": [[(1, SIDE, SIDE)]]}
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(1.0 * SIDE), torch.arange(1.0 * SIDE)).to(where)
    return {
        **out,
        "pooled_projections": noise(1, 64),
        "img_ids": grid,
        "txt_ids": torch.zeros(WORDS, 3, device=where),
    }


def step(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The output of one denoising step."""
    with torch.no_grad():
        out = model(**arguments)
    said: Tensor = out if isinstance(out, Tensor) else out[0]
    return said
