"""A Stable Diffusion pipeline as the parts that a method of tiling needs, and a count of what it spends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def counted(network: Any, patch: int = 1) -> Iterator[list[int]]:
    """The latent pixels of each call of a network, each guidance branch for itself; ``patch``: the side of a token.

    They are counted at its first layer, which no wrapper of the forward hides.
    """
    spent: list[int] = []

    def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
        found = inputs[0]  # [B, C, H, W], or tokens [B, N, C]
        spent.append(found[:, 0].numel() if found.ndim == 4 else found[..., 0].numel() * patch**2)

    first = network.conv_in if hasattr(network, "conv_in") else network.x_embedder
    handle = first.register_forward_pre_hook(count)
    try:
        yield spent
    finally:
        handle.remove()


class Model:
    """A prompt's guided prediction on windows, and the scheduler's steps.

    ``pipe`` is a ``StableDiffusionPipeline`` with DDIM, which keeps no history: the methods step windows alone.
    ``batch``: windows per network evaluation.
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
        return self.pipe.scheduler.step(prediction, t, sample).prev_sample

    def noised(self, sample: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.pipe.scheduler.add_noise(sample, noise, t[None])
