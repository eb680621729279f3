"""A pipeline small enough to try things with: Z-Image with random weights, which draws noise, and the bundled
Llama as its text encoder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import AutoModel, AutoTokenizer

LLAMA = Path(__file__).parents[1] / "models" / "tiny-llama"


def make(folder: str | None = None) -> str:
    """Saves the pipeline in BF16; returns the folder, a new one by default."""
    torch.manual_seed(0)
    text_encoder = AutoModel.from_pretrained(LLAMA, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=text_encoder.config.hidden_size,
        axes_dims=[16, 8, 8],
        axes_lens=[256, 32, 32],
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    pipe = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, text_encoder, tokenizer, transformer)
    to = folder or tempfile.mkdtemp(prefix="tiny-z-image-")
    pipe.to(dtype=torch.bfloat16).save_pretrained(to)
    return to
