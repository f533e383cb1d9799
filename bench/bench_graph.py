"""Cases of CUDA graphs: a whole generation with replayed steps against eager steps, on a random UNet like SD 1.5's."""

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bench.case import Case, Ready
from bench.measure import Run
from tiledcore import TiledPipeline, TilingConfig

UNET: dict[str, Any] = {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
CANVAS, STEPS = 128, 8  # latent pixels


def build(device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline without its text encoder: prompts are given as embeddings."""
    small = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device(device):
        unet = UNet2DConditionModel(**UNET).to(dtype).eval()
        vae = AutoencoderKL(block_out_channels=(32,) * 4, **small).to(dtype)
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipe = StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prepare(tile: int, device: torch.device, dtype: torch.dtype) -> Ready:
    pipe, text = build(device, dtype), torch.randn(2, 1, 77, 768).to(device, dtype)
    call: dict[str, Any] = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "output_type": "latent"}
    call |= {"height": 8 * CANVAS, "width": 8 * CANVAS, "num_inference_steps": STEPS}

    def run(wrapped: TiledPipeline) -> Tensor:
        result: Tensor = wrapped(generator=torch.Generator().manual_seed(0), **call).images
        return result

    tiling = TilingConfig(tile=tile)
    runs: dict[str, Run] = {
        name: partial(run, TiledPipeline.from_pipe(pipe, tiling=tiling, cuda_graph=name == "graph"))
        for name in ("eager", "graph")
    }
    return Ready(runs, "eager", {}, expected=runs["eager"], checked=("graph",))


def cases() -> list[Case]:
    return [
        Case("graph", f"SD 1.5, {STEPS} steps, tiles of {tile}x{tile} on {CANVAS}x{CANVAS}", "eager steps",
             partial(prepare, tile))
        for tile in (64, 96)
        if torch.cuda.is_available()
    ]  # fmt: skip
