"""Tiny random pipelines of Diffusers, saved, and what to call them with: no tokenizer, the embeddings of a
prompt instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

STEPS = 3


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _vae(channels: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )


def _clip() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return CLIPTextModel(
        CLIPTextConfig(vocab_size=64, max_position_embeddings=16, projection_dim=32, **sizes)
    )


def _t5() -> Any:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))


def flux() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = diffusers.FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), _vae(), _clip(), None, _t5(), None, transformer
    )
    return pipe, {
        "prompt_embeds": randn(1, 8, 32),
        "pooled_prompt_embeds": randn(1, 32),
        "height": 16,
        "width": 16,
    }


def stable_diffusion_3() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), _vae(), None, None, None, None, None, None
    )
    prompt = {"prompt_embeds": randn(1, 8, 32), "pooled_prompt_embeds": randn(1, 64)}
    negative = {
        "negative_prompt_embeds": randn(1, 8, 32, seed=2),
        "negative_pooled_prompt_embeds": randn(1, 64, seed=2),
    }
    return pipe, {**prompt, **negative, "height": 16, "width": 16}


def qwen_image() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = diffusers.QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    call = {"prompt_embeds": randn(1, 8, 32), "prompt_embeds_mask": torch.ones(1, 8, dtype=torch.int64)}
    return pipe, {**call, "height": 32, "width": 32, "true_cfg_scale": 1.0}


def wan() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = diffusers.WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), transformer)
    call = {"prompt_embeds": randn(1, 8, 32), "negative_prompt_embeds": randn(1, 8, 32, seed=2)}
    return pipe, {**call, "height": 16, "width": 16, "num_frames": 5}


def z_image() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    pipe = diffusers.ZImagePipeline(FlowMatchEulerDiscreteScheduler(), _vae(16), None, None, transformer)
    return pipe, {"prompt_embeds": [randn(8, 16)], "height": 32, "width": 32, "guidance_scale": 0.0}


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "flux": flux,
    "qwen_image": qwen_image,
    "wan": wan,
    "stable_diffusion_3": stable_diffusion_3,
    "z_image": z_image,
}


def saved(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A pipeline in BF16 in a folder, and what to call it with."""
    torch.manual_seed(0)
    pipe, call = PIPELINES[name]()
    pipe.to(dtype=torch.bfloat16)
    pipe.save_pretrained(folder)
    return folder, {**call, "num_inference_steps": STEPS}


def absent(folder: Path) -> dict[str, None]:
    """The components that a pipeline was saved without, as Diffusers asks for them to be passed."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, kind in index.items() if isinstance(kind, list) and kind[0] is None}


def loaded(folder: Path, **options: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=torch.bfloat16, **{**absent(folder), **options}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
