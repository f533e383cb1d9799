"""Cases of the autoencoder: exact bands against decoding and encoding the whole image.

Weights are random, and so are scales and shifts of the norms, so that an error in their statistics shows. diffusers'
own tiling is another computation, so it is not among them.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from bench.case import Case, Ready
from bench.measure import Run
from tiledcore.memory.architectures import architecture
from tiledcore.vae.exact import exact_bands

SDXL = dict(architecture("sdxl").vae.config)
SMALL = SDXL | {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4, "sample_size": 128}
TINY = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "small like SDXL's": (AutoencoderKL, SMALL),
    "AutoencoderTiny": (AutoencoderTiny, TINY),
    "SDXL's": (AutoencoderKL, SDXL),
}
SIZE, HEIGHTS = 512, (128, 64)  # px, of the image and of the bands


def build(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same random weights each time."""
    kind, config = KINDS[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        vae = kind(**config).eval()
        for module in vae.modules():
            if isinstance(module, torch.nn.GroupNorm):
                torch.nn.init.normal_(module.weight, 1.0, 0.3)
                torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return torch.nn.Module.to(vae, device=device, dtype=dtype)


def prepare(name: str, direction: str, device: torch.device, dtype: torch.dtype) -> Ready:
    vae, generator = build(name, device, dtype), torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, SIZE, SIZE, generator=generator).mul(2).sub(1).to(device, dtype)
    latents = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=generator).to(device, dtype)

    def whole() -> Tensor:
        if direction == "decode":
            return vae.decode(latents).sample
        output = vae.encode(image)
        return output.latent_dist.parameters if hasattr(output, "latent_dist") else output[0]

    def bands(height: int) -> Tensor:
        with exact_bands(vae, band_px=height):
            return whole()

    runs: dict[str, Run] = {"whole": whole} | {f"bands of {height} px": partial(bands, height) for height in HEIGHTS}
    return Ready(runs, "whole", {}, expected=whole)


def cases() -> Iterator[Case]:
    names = [name for name in KINDS if torch.cuda.is_available() or KINDS[name][1] is not SDXL]  # minutes on a CPU
    for name, direction in product(names, ("decode", "encode")):
        quick = name == "small like SDXL's"
        run = partial(prepare, name, direction)
        yield Case(f"vae_{direction}", f"{name}, {SIZE}x{SIZE}", "the whole image at once", run, quick)
