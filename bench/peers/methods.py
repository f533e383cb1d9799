"""The other methods. Each takes a :class:`Model` and noise ``[1, C, H, W]``, and gives latents.

Sizes that a paper gives for another model are kept in proportion to the window.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.windows import average, cut, grid


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
    with first.register_forward_pre_hook(count):
        yield spent


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


def dense(model: Model, noise: Tensor) -> Tensor:
    """The whole canvas at once, without tiles."""
    for t in model.timesteps:
        noise = model.step(model.predict(noise, t), t, noise)
    return noise


def multidiffusion(model: Model, noise: Tensor, stride: int | None = None) -> Tensor:
    """MultiDiffusion (Bar-Tal et al., ICML 2023): step every window alone, and average where they overlap (eq. 5).

    The stride is an eighth of the window by default: theirs is 8 of 64 latent pixels.
    """
    window = model.native
    corners = grid(noise.shape[2:], window, stride or window // 8)
    sample = noise
    for t in model.timesteps:
        windows = cut(sample, corners, window)
        sample = average(model.step(model.predict(windows, t), t, windows), corners, sample)
    return sample


def mixture_of_diffusers(model: Model, noise: Tensor) -> Tensor:
    """Mixture of Diffusers (Jiménez 2023): predictions are averaged with Gaussian weights, then one step for all.

    The Gaussian has variance 0.01 in units of the window. Windows share 3/8 of their side (256 of 640 px in the paper).
    """
    window = model.native
    corners = grid(noise.shape[2:], window, window - window * 3 // 8)
    at = (torch.arange(window, device=noise.device) + 0.5) / window - 0.5
    line = torch.exp(-(at**2) / (2 * 0.01)).to(noise)
    sample = noise
    for t in model.timesteps:
        predictions = model.predict(cut(sample, corners, window), t)
        sample = model.step(average(predictions, corners, sample, line[:, None] * line), t, sample)
    return sample


def spotdiffusion(model: Model, noise: Tensor, seed: int = 0) -> Tensor:
    """SpotDiffusion (Frolov et al., WACV 2025): windows without overlap, all moved by a random offset in each step.

    A window that leaves the canvas continues at the other side.
    """
    window, (height, width) = model.native, noise.shape[2:]
    if height % window or width % window:
        raise ValueError(f"a canvas of {height}x{width} latent pixels is no multiple of the window, {window}")
    corners = grid(noise.shape[2:], window, window)
    generator = torch.Generator().manual_seed(seed)
    sample = noise
    for t in model.timesteps:
        shift = tuple(torch.randint(0, window, (2,), generator=generator).tolist())
        moved = sample.roll(shift, (2, 3))
        prediction = average(model.predict(cut(moved, corners, window), t), corners, moved)
        sample = model.step(prediction.roll((-shift[0], -shift[1]), (2, 3)), t, sample)
    return sample


def demofusion(model: Model, noise: Tensor, seed: int = 0) -> Tensor:
    """DemoFusion (Du et al., CVPR 2024): the canvas grows by one window's side in each phase and is denoised anew.

    - Progressive upscaling: the result of a phase is enlarged (bicubic) and noised to every timestep.
    - Skip residual: before a step, that noised image is mixed in with weight c^3, c = (1 + cos(pi (T - t) / T)) / 2.
    - Local paths: MultiDiffusion with a stride of half a window; inner windows move at random by up to a quarter.
    - Dilated sampling: every s-th pixel along both axes is also a window. It sees the canvas through a Gaussian filter
      of c pixels, 0.01 at the end. Its result is mixed with the local one, with weight c. Our reading: the filtered
      canvas keeps its mean and deviation, and the step is made from the canvas without the filter.
    """
    window, (height, width) = model.native, noise.shape[2:]
    if height != width or height % window:
        raise ValueError(f"a canvas of {height}x{width} latent pixels must be square and a multiple of {window}")
    generator = torch.Generator(noise.device).manual_seed(seed)
    last = height // window
    sample = dense(model, noise[:, :, :window, :window])
    for s in range(2, last + 1):
        size = (s * window, s * window)
        guide = F.interpolate(sample, size, mode="bicubic")
        shape = (*noise.shape[:2], *size)
        added = noise if s == last else torch.randn(shape, generator=generator, device=noise.device, dtype=noise.dtype)
        sample = model.noised(guide, added, model.timesteps[0])
        for t in model.timesteps:
            cosine = (1 + math.cos(math.pi * (1 - float(t) / model.pipe.scheduler.config.num_train_timesteps))) / 2
            mixed = cosine**3 * model.noised(guide, added, t) + (1 - cosine**3) * sample
            dilated = _dilated(model, mixed, t, s, 0.01 + 0.99 * cosine)
            sample = cosine * dilated + (1 - cosine) * _local(model, mixed, t, generator)
    return sample


def _local(model: Model, sample: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """One step of every window of a grid at half strides, each moved by itself, but those at the border."""
    window, corners = model.native, []
    reach = window // 4
    limits = [size - window for size in sample.shape[2:]]
    for corner in grid(sample.shape[2:], window, window // 2):
        moves = torch.randint(-reach, reach + 1, (2,), generator=generator, device=generator.device).tolist()
        inner = [min(max(a + m, 0), n) if 0 < a < n else a for a, m, n in zip(corner, moves, limits, strict=True)]
        corners.append((inner[0], inner[1]))
    windows = cut(sample, corners, window)
    return average(model.step(model.predict(windows, t), t, windows), corners, sample)


def _dilated(model: Model, sample: Tensor, t: Tensor, s: int, sigma: float) -> Tensor:
    """One step of the ``s²`` windows that have every s-th pixel."""
    at = torch.arange(-3, 4, device=sample.device, dtype=sample.dtype)  # the filter is cut off at 3 pixels
    line = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
    padded = F.pad(sample, (3, 3, 3, 3), mode="reflect")
    seen = F.conv2d(padded.transpose(0, 1), kernel).transpose(0, 1)
    mean, deviation = sample.mean((2, 3), keepdim=True), sample.std((2, 3), keepdim=True)
    seen = (seen - seen.mean((2, 3), keepdim=True)) / seen.std((2, 3), keepdim=True) * deviation + mean
    predicted = model.predict(torch.cat([seen[:, :, y::s, x::s] for y in range(s) for x in range(s)]), t)
    prediction = torch.empty_like(sample)
    for index, window in enumerate(predicted):
        prediction[0, :, index // s :: s, index % s :: s] = window
    return model.step(prediction, t, sample)
