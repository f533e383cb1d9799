"""Tiling as a switch in a script that has a diffusers pipeline already."""

import argparse

import torch
from diffusers import DiffusionPipeline

from tiledcore import TilingConfig, apply_tiling, remove_tiling
from tiledcore.models import EMBEDDED

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=1024, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(EMBEDDED.get(args.model, args.model))
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

apply_tiling(pipe, TilingConfig.fast())  # from here on every call is tiled
image = pipe(
    "relief map of a rugged coast",
    height=args.size,
    width=args.size,
    num_inference_steps=args.steps,
    guidance_scale=3.0,
).images[0]
image.save("diffusers_script.png")
remove_tiling(pipe)  # the pipeline is as before
