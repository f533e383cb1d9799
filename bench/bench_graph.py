"""Graph replay against eager steps: equal bits, and time, on random UNets of the real architectures. Needs CUDA.

    python -m bench.bench_graph [--json out.json]

One SD 1.5-shaped and one SDXL-shaped UNet with random fp16 weights, tiles of 64, 96 and 128 latent pixels, 4 and 30
steps. First, 30 steps with and without a graph must give the same bits; then each is timed, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel

from bench import timing
from tiledcore import TiledPipeline, TilingConfig

UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "SDXL without its size conditions": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    },
}
CANVAS = 256  # latent pixels


def build(name: str) -> Any:
    """A pipeline without its text encoder: prompts are given as embeddings."""
    with torch.device("cuda"):
        unet = UNet2DConditionModel(**UNETS[name]).half().eval()
        vae = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4).half()  # fmt: skip
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipe = StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def runner(pipe: Any, tile: int, graph: bool) -> Callable[[int], torch.Tensor]:
    wrapped = TiledPipeline.from_pipe(pipe, tiling=TilingConfig(tile=tile, tile_batch=4), cuda_graph=graph)
    width = pipe.unet.config.cross_attention_dim
    text = torch.randn(2, 1, 77, width, generator=torch.Generator().manual_seed(1)).half().cuda()

    def run(steps: int) -> torch.Tensor:
        return wrapped(
            prompt_embeds=text[:1, 0],
            negative_prompt_embeds=text[1:, 0],
            height=8 * CANVAS,
            width=8 * CANVAS,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    return run


def seconds(run: Callable[[int], torch.Tensor], steps: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(steps)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_graph needs a CUDA device")
    rows = []
    for name in UNETS:
        pipe = build(name)
        for tile in (64, 96, 128):
            eager, graph = (runner(pipe, tile, on) for on in (False, True))
            if not torch.equal(eager(30), graph(30)):
                raise SystemExit(f"{name}, tile {tile}: replay differs from eager")
            for steps in (4, 30):
                times: dict[str, list[float]] = {"eager": [], "graph": []}
                for _ in range(args.rounds):
                    times["eager"].append(seconds(eager, steps))
                    times["graph"].append(seconds(graph, steps))
                row: dict[str, Any] = {key: statistics.median(values) for key, values in times.items()}
                row |= {"unet": name, "tile": tile, "steps": steps, "speedup": row["eager"] / row["graph"]}
                rows.append(row)
                print(rows[-1], flush=True)
    if args.json:
        machine = timing.machine(torch.device("cuda"))
        args.json.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
