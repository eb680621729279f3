"""A pipeline beside another: how far what they draw is apart, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

_WINDOW = 7  # pixels, as of scikit-image
Frames = NDArray[np.float32]
"""Planes ``[..., height, width]``."""


@dataclass(frozen=True)
class Distance:
    """How near two pictures are.

    Attributes:
        psnr: Peak signal to noise ratio in dB, over the range of the first; infinite where they are equal.
        ssim: Structural similarity, the mean over planes, 1 where they are equal; None for planes of less
            than 3 x 3 (Wang et al., 2004; doi:10.1109/TIP.2003.819861).
    """

    psnr: float
    ssim: float | None


@dataclass(frozen=True)
class Comparison:
    """What two pipelines drew of one prompt and seed.

    Attributes:
        steps: Latents after each step.
        result: What was drawn; all frames of a video.
        picture: Both beside each other, the reference on the left; of a video the first frame.
    """

    steps: tuple[Distance, ...]
    result: Distance
    picture: Image.Image


def compare(reference: Any, other: Any, *, seed: int = 0, **call: Any) -> Comparison:
    """Runs two pipelines with the same noise.

    Args:
        reference: A pipeline, such as that in 16 bits.
        other: The same pipeline, quantized.
        seed: Of the noise, which is drawn on the CPU.
        call: As of the pipelines: ``prompt`` or its embeddings, ``num_inference_steps``, ``height``...
    """
    (steps_a, drawn_a), (steps_b, drawn_b) = (_run(pipe, seed, call) for pipe in (reference, other))
    steps = tuple(distance(a, b) for a, b in zip(steps_a, steps_b, strict=True))
    pictures = [Image.fromarray((255 * frames[0]).round().astype(np.uint8)) for frames in (drawn_a, drawn_b)]
    both = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[1], (pictures[0].width, 0))
    planes_a, planes_b = (np.moveaxis(frames, -1, 1) for frames in (drawn_a, drawn_b))
    return Comparison(steps, distance(planes_a, planes_b, 1.0), both)


def distance(a: Frames, b: Frames, data_range: float | None = None) -> Distance:
    """How near ``b`` is to ``a``; values over ``data_range``, by default that of ``a``."""
    span = data_range or float(a.max() - a.min()) or 1.0
    psnr = float("inf") if np.array_equal(a, b) else float(peak_signal_noise_ratio(a, b, data_range=span))
    height, width = a.shape[-2:]
    window = min(_WINDOW, height - (height + 1) % 2, width - (width + 1) % 2)
    if window < 3:
        return Distance(psnr, None)
    pairs = zip(a.reshape(-1, height, width), b.reshape(-1, height, width), strict=True)
    ssim = [structural_similarity(x, y, data_range=span, win_size=window) for x, y in pairs]
    return Distance(psnr, float(np.mean(ssim)))


def _run(pipe: Any, seed: int, call: dict[str, Any]) -> tuple[list[Frames], Frames]:
    """Latents after each step, as planes, and what is drawn: ``[frames, height, width, 3]`` from 0 to 1."""
    seen: list[Frames] = []

    def note(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(_planes(pipe, tensors["latents"], call))
        return {}

    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = pipe(**call, generator=generator, output_type="np", callback_on_step_end=note)[0]
    return seen, np.asarray(drawn, np.float32).reshape(-1, *np.shape(drawn)[-3:])


def _planes(pipe: Any, latents: Tensor, call: dict[str, Any]) -> Frames:
    """Latents as planes; pipelines that pack patches of them know how to unpack them."""
    unpack: Callable[..., Tensor] | None = getattr(pipe, "_unpack_latents", None)
    if unpack is not None:
        size = [
            call.get(key) or pipe.default_sample_size * pipe.vae_scale_factor for key in ("height", "width")
        ]
        latents = unpack(latents, *size, pipe.vae_scale_factor)
    planes: Frames = latents.float().cpu().numpy()
    return planes
