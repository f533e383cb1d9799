"""Exact bands against the untiled autoencoder, and diffusers' own tiling beside them: error, peak and time.

The error is the largest difference from the untiled result of the same weights, over the largest value of
that. diffusers' tiles are half the image, so that there are tiles at every size. The weights are random, with
scales and shifts of the norms that are not 1 and 0, so that an error of their statistics shows. The peak is
of tensors made during the call, the finished image included.

    python -m bench.bench_vae                      # small ones like SDXL's and Sana's, and AutoencoderTiny
    python -m bench.bench_vae --full --sizes 512   # SDXL's and Sana's own architectures; minutes on a CPU
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from bench import timing
from tiledcore.vae import exact as bands
from tiledcore.vae.live_bytes import LiveBytes

SDXL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
SMALL = SDXL | {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4, "sample_size": 128}
BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SANA = {"encoder_block_types": BLOCKS, "decoder_block_types": BLOCKS}
SMALL_SANA = SANA | {
    "encoder_block_out_channels": (8, 8, 16, 16, 32, 32),
    "decoder_block_out_channels": (8, 8, 16, 16, 32, 32),
    "attention_head_dim": 8,
}
TINY = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}


def build(kind: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The same random weights each time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        vae = kind(**config).eval()
        for module in vae.modules():
            if isinstance(module, torch.nn.GroupNorm | RMSNorm):
                torch.nn.init.normal_(module.weight, 1.0, 0.3)
                torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return torch.nn.Module.to(vae, device=device, dtype=dtype)


def measured(run: Callable[[], Tensor]) -> tuple[Tensor, int, float]:
    """Result, peak and seconds, all of one run: counting costs some microseconds an operation."""
    start = time.perf_counter()
    with torch.no_grad(), LiveBytes() as live:
        result = run()
        if result.is_cuda:
            torch.cuda.synchronize()
    return result, live.peak, time.perf_counter() - start


def relative(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact.double()).abs().max() / exact.double().abs().max())


def case(name: str, vae: Any, size: int, heights: list[int], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Both directions of one autoencoder at one size."""
    generator = torch.Generator().manual_seed(1)
    weight = next(vae.parameters())
    image = torch.rand(1, 3, size, size, generator=generator).mul(2).sub(1).to(weight.device, dtype)
    factor = getattr(vae, "spatial_compression_ratio", 8)
    latents = torch.randn(1, vae.config.latent_channels, size // factor, size // factor, generator=generator)
    latents = latents.to(weight.device, dtype)

    def encoded(output: Any) -> Tensor:
        if isinstance(vae, AutoencoderKL):
            return output.latent_dist.parameters
        return output[0]

    rows: list[dict[str, Any]] = []
    for direction in ("decode", "encode"):

        def plain(direction: str = direction) -> Tensor:
            return vae.decode(latents).sample if direction == "decode" else encoded(vae.encode(image))

        def banded(height: int, direction: str = direction) -> Tensor:
            if direction == "decode":
                return bands.decode(vae, latents, height)
            return encoded(bands.encode(vae, image, height))

        def record(way: str, run: Callable[[], Tensor], exact: Tensor | None, direction: str = direction) -> Tensor:
            result, peak, seconds = measured(run)
            error = 0.0 if exact is None else relative(result, exact)
            print(f"{name} {size}² {direction:7}{way:18}{error:12.2e}{peak / 2**20:12.1f}{seconds:10.2f}", flush=True)
            row = {"vae": name, "size": size, "direction": direction, "way": way}
            rows.append(row | {"error": error, "peak_bytes": peak, "seconds": seconds})
            return result

        exact = record("untiled", plain, None)
        for height in heights:
            record(f"bands of {height} px", partial(banded, height), exact)
        if isinstance(vae, AutoencoderDC):
            vae.enable_tiling(size // 2, size // 2, size * 3 // 8, size * 3 // 8)
        else:
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = size // 2, size // 16
        record("enable_tiling", plain, exact)
        vae.disable_tiling()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="float16, bfloat16 or float32")
    parser.add_argument("--full", action="store_true", help="SDXL's and Sana's architectures, not small ones")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512])
    parser.add_argument("--heights", type=int, nargs="+", default=[256, 128, 64], help="of the bands, in px")
    parser.add_argument("--json", type=Path, help="also write the results there")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(timing.machine(device), args.dtype)
    print(f"{'autoencoder, size, direction, way':45}{'error':>8}{'peak MiB':>12}{'seconds':>10}")
    kinds: list[tuple[str, Any, dict[str, Any]]] = [("SDXL", AutoencoderKL, SDXL), ("Sana", AutoencoderDC, SANA)]
    if not args.full:
        kinds = [("small", AutoencoderKL, SMALL), ("tiny", AutoencoderTiny, TINY), ("dc", AutoencoderDC, SMALL_SANA)]
    rows = []
    for name, kind, config in kinds:
        vae = build(kind, config, device, dtype)
        for size in args.sizes:
            rows += case(name, vae, size, args.heights, dtype)
    timing.save(args.json, device, rows)


if __name__ == "__main__":
    main()
