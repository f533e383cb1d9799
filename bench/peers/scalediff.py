"""ScaleDiff (Koh et al., NeurIPS 2025): a small image is enlarged in stages, with attention to neighbouring patches.

From the paper: the image doubles in each stage, is noised and denoised again (SDEdit) with the whole canvas in the
network. Only self-attention is cut: queries in patches of half the native side, each with the keys and values of a
window of the native side around it, which is moved inward at a border (Neighborhood Patch Attention).

Our reading, as no code was published:

- Latent Frequency Mixing: low frequencies of the image that was enlarged as pixels, high ones of the enlarged latents.
- Structure Guidance: the low frequencies of each prediction of the clean latents are pulled to those of the enlarged
  ones, with a weight that falls with the timestep.
- Each stage runs the last ``STRENGTH`` of the steps, as our stages do, so that the work is comparable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.methods import Model, dense

STRENGTH = 0.6


def neighborhood_patch_attention(
    native: int, canvas: int, attn: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> Tensor:
    """An attention processor; ``native`` and ``canvas`` are the sides of the model's images and of this square one."""
    batch, length, _channels = hidden_states.shape
    side = round(length**0.5)
    window = max(2, native * side // canvas)
    shape = (batch, side, side, attn.heads, -1)
    parts = (project(hidden_states).view(shape) for project in (attn.to_q, attn.to_k, attn.to_v))
    query, key, value = (part.permute(0, 3, 1, 2, 4) for part in parts)  # [B, heads, y, x, d]
    result, patch = torch.empty_like(query), window // 2
    for y, x in product(range(0, side, patch), repeat=2):
        b, a = (min(max(at - patch // 2, 0), max(side - window, 0)) for at in (y, x))
        q = query[:, :, y : y + patch, x : x + patch]
        k, v = (part[:, :, b : b + window, a : a + window].flatten(2, 3) for part in (key, value))
        found = F.scaled_dot_product_attention(q.flatten(2, 3), k, v)
        result[:, :, y : y + patch, x : x + patch] = found.view_as(q)
    return attn.to_out[0](result.permute(0, 2, 3, 1, 4).reshape(batch, length, -1))


@contextmanager
def patch_attention(unet: Any, side: int) -> Iterator[None]:
    """Replace all self-attention of a UNet whose canvas has ``side`` latent pixels."""
    before = unet.attn_processors
    own = partial(neighborhood_patch_attention, unet.config.sample_size, side)
    unet.set_attn_processor({name: own if ".attn1." in name else old for name, old in before.items()})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def low(latents: Tensor, native: int) -> Tensor:
    """What of the latents an image of native size can hold."""
    small = F.interpolate(latents.float(), (native, native), mode="bicubic", antialias=True)
    return F.interpolate(small, latents.shape[2:], mode="bicubic").to(latents)


def enlarged(model: Model, sample: Tensor, side: int) -> Tensor:
    """Latent Frequency Mixing."""
    vae, native = model.pipe.vae, sample.shape[-1]
    pixels = vae.decode(sample / vae.config.scaling_factor).sample
    pixels = F.interpolate(pixels, (8 * side, 8 * side), mode="bicubic").clamp(-1, 1)
    of_pixels = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    of_latents = F.interpolate(sample, (side, side), mode="bicubic")
    return low(of_pixels, native) + of_latents - low(of_latents, native)


def guided(model: Model, prediction: Tensor, sample: Tensor, t: Tensor, guide: Tensor) -> Tensor:
    """Structure Guidance: the prediction whose clean latents are pulled to ``guide``."""
    scheduler = model.pipe.scheduler
    power = scheduler.alphas_cumprod[int(t)].to(sample)
    a, s = power.sqrt(), (1 - power).sqrt()
    velocity = scheduler.config.prediction_type == "v_prediction"
    clean = a * sample - s * prediction if velocity else (sample - s * prediction) / a
    weight = float(t) / scheduler.config.num_train_timesteps
    clean = clean + weight * (low(guide, model.native) - low(clean, model.native))
    return (a * sample - clean) / s if velocity else (sample - a * clean) / s


def scalediff(model: Model, noise: Tensor, seed: int = 0) -> Tensor:
    """The latents of a square canvas whose side is the native one times a power of two."""
    side, last = model.native, noise.shape[-1]
    if noise.shape[-2] != last or last % side or (last // side).bit_count() != 1:
        raise ValueError(f"a canvas of {noise.shape[-2]}x{last}: must be {side} times a power of two, and square")
    generator = torch.Generator(noise.device).manual_seed(seed)
    sample = dense(model, noise[:, :, :side, :side])
    steps = model.timesteps[-max(1, int(len(model.timesteps) * STRENGTH)) :]
    while side < last:
        side *= 2
        guide = enlarged(model, sample, side)
        added = torch.randn(guide.shape, generator=generator, device=guide.device, dtype=guide.dtype)
        sample = model.noised(guide, noise if side == last else added, steps[0])
        with patch_attention(model.pipe.unet, side):
            for t in steps:
                prediction = model.predict(sample, t)
                sample = model.step(guided(model, prediction, sample, t, guide), t, sample)
    return sample
