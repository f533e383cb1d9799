"""A Stable Diffusion pipeline as the parts that a method of tiling needs, and a count of what it spends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Spent:
    """What the network was given while it was counted."""

    evaluations: int = 0
    """Calls of its forward."""
    pixels: int = 0
    """Latent pixels over all calls, each guidance branch for itself."""


@contextmanager
def counted(network: Any, patch: int = 1) -> Iterator[Spent]:
    """Count at the network's first layer, which no wrapper of the forward hides. ``patch``: latent pixels per token."""
    spent = Spent()

    def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
        found = inputs[0]  # [B, C, H, W], or tokens [B, N, C]
        spent.evaluations += 1
        spent.pixels += found.shape[0] * (found[0, 0].numel() if found.ndim == 4 else found.shape[1] * patch**2)

    first = network.conv_in if hasattr(network, "conv_in") else network.x_embedder
    handle = first.register_forward_pre_hook(count)
    try:
        yield spent
    finally:
        handle.remove()


class Model:
    """A prompt's guided prediction on windows, and the scheduler's steps.

    Args:
        pipe: a ``StableDiffusionPipeline`` with DDIM, which keeps no history: the methods step windows alone.
        prompt: what to draw.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance (Ho and Salimans 2022).
        batch: windows per network evaluation.
    """

    def __init__(self, pipe: Any, prompt: str, steps: int, guidance_scale: float, batch: int = 4) -> None:
        if type(pipe.scheduler).__name__ != "DDIMScheduler":
            raise ValueError(f"scheduler={type(pipe.scheduler).__name__}: the peers step windows alone; must be DDIM")
        self.pipe, self.guidance_scale, self.batch = pipe, guidance_scale, batch
        self.native: int = pipe.unet.config.sample_size
        device = pipe._execution_device
        text, nothing = pipe.encode_prompt(prompt, device, 1, True)
        self.text = torch.cat([nothing, text])
        pipe.scheduler.set_timesteps(steps, device=device)
        self.timesteps: Tensor = pipe.scheduler.timesteps

    def predict(self, windows: Tensor, t: Tensor) -> Tensor:
        """Guided prediction for ``[N, C, h, w]``, each of them alone."""
        out = []
        for part in windows.split(self.batch):
            text = self.text.repeat_interleave(len(part), 0)
            nothing, told = self.pipe.unet(torch.cat([part, part]), t, encoder_hidden_states=text).sample.chunk(2)
            out.append(nothing + self.guidance_scale * (told - nothing))
        return torch.cat(out)

    def step(self, prediction: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        """One step of DDIM, which is the same for a window as for the canvas."""
        result: Tensor = self.pipe.scheduler.step(prediction, t, sample).prev_sample
        return result

    def noised(self, sample: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.pipe.scheduler.add_noise(sample, noise, t[None])
        return result
