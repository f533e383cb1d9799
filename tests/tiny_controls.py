"""Tiny ControlNet pipelines of the real classes on the tiny networks, with weights where diffusers has zeros."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from PIL import Image
from tiny import tiny_sd
from tiny_transformers import CHANNELS, build, tiny_flux, tiny_qwen, tiny_sana, tiny_sd3, tiny_z_image


def control_sd(count: int = 1) -> Any:
    parts = tiny_sd()
    nets = [diffusers.ControlNetModel.from_unet(parts.unet, conditioning_channels=3) for _ in range(count)]
    return _pipe(diffusers.StableDiffusionControlNetPipeline, parts, nets, requires_safety_checker=False)


def control_flux(count: int = 1) -> Any:
    parts = build(tiny_flux)
    shape = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    nets = [diffusers.FluxControlNetModel.from_transformer(parts.transformer, **shape) for _ in range(count)]
    return _pipe(diffusers.FluxControlNetPipeline, parts, nets)


def control_sd3(count: int = 1) -> Any:
    parts = build(tiny_sd3)
    parts.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()  # the pipeline gives it no mu
    shape = {"num_layers": 1, "num_extra_conditioning_channels": 0}
    nets = [diffusers.SD3ControlNetModel.from_transformer(parts.transformer, **shape) for _ in range(count)]
    return _pipe(diffusers.StableDiffusion3ControlNetPipeline, parts, nets)


def control_qwen(count: int = 1) -> Any:
    parts = build(tiny_qwen)
    shape = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    net = diffusers.QwenImageControlNetModel.from_transformer(parts.transformer, **shape)
    # Several hints of one union network.
    nets = net if count == 1 else diffusers.QwenImageMultiControlNetModel([net])
    return _pipe(diffusers.QwenImageControlNetPipeline, parts, [nets])


def control_sana(count: int = 1) -> Any:
    parts = build(tiny_sana)
    config = dict(parts.transformer.config) | {"num_layers": 1}
    names = diffusers.SanaControlNetModel.__init__.__wrapped__.__code__.co_varnames
    nets = [
        diffusers.SanaControlNetModel(**{name: value for name, value in config.items() if name in names})
        for _ in range(count)
    ]
    return _pipe(diffusers.SanaControlNetPipeline, parts, nets)


def control_z_image(count: int = 1) -> Any:
    parts = build(tiny_z_image)
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=CHANNELS,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    made = diffusers.ZImageControlNetModel.from_transformer(net, parts.transformer)
    return _pipe(diffusers.ZImageControlNetPipeline, parts, [made])


SOURCES: dict[Callable[..., Any], Any] = {
    control_sd: tiny_sd,
    control_flux: tiny_flux,
    control_sd3: tiny_sd3,
    control_qwen: tiny_qwen,
    control_sana: tiny_sana,
    control_z_image: tiny_z_image,
}
"""Which pipeline each stands on: how it is called."""


def _pipe(kind: type, parts: Any, nets: list[Any], **more: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for net in nets:
            for parameter in net.eval().parameters():  # zeros and random ones; each net gets its own
                torch.nn.init.normal_(parameter, std=0.3)
    known = kind.__init__.__code__.co_varnames  # type: ignore[misc]
    given = {name: part for name, part in parts.components.items() if name in known}
    made = kind(**given, controlnet=nets[0] if len(nets) == 1 else nets, **more)
    made.set_progress_bar_config(disable=True)
    if hasattr(parts, "default_sample_size") and hasattr(made, "default_sample_size"):
        made.default_sample_size = parts.default_sample_size
    encode_locally(made)
    return made


def encode_locally(pipe: Any) -> None:
    """Replace the encoder of hints by means of blocks: without noise, and local to a part of a hint."""

    def encode(image: torch.Tensor, **_: Any) -> Any:
        side = pipe.vae_scale_factor
        blocks = image.unflatten(-1, (-1, side)).mean(-1).unflatten(-2, (-1, side)).mean(-2)
        latent = blocks.repeat_interleave(2, 1)[:, :CHANNELS].contiguous()
        drawn = SimpleNamespace(sample=lambda *_, **__: latent, mode=lambda: latent)
        return SimpleNamespace(latent_dist=drawn, latent=latent)

    pipe.vae.encode = encode


def hint(height: int, width: int, colours: list[tuple[int, int, int]]) -> Image.Image:
    """One colour, or one in each quadrant."""
    image = Image.new("RGB", (width, height), colours[0])
    if len(colours) == 1:
        return image
    for i, colour in enumerate(colours):
        y, x = divmod(i, 2)
        image.paste(colour, (x * width // 2, y * height // 2, (x + 1) * width // 2, (y + 1) * height // 2))
    return image
