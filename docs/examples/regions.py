"""Parts of one image with prompts of their own, and soft borders between them."""

import argparse

import torch

from tiledcore import Region, TiledPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=1024, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

pipe = TiledPipeline.from_pretrained(args.model)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

half = args.size // 2
image = pipe(
    "topographic map of a rugged coast",  # of the rest of the image
    height=args.size,
    width=args.size,
    num_inference_steps=args.steps,
    guidance_scale=3.0,
    regions=[
        Region("satellite image of a desert", box=(0, 0, half, args.size), feather=64),
        Region("snow and ice", box=(half, 0, args.size, half), feather=64, weight=0.7),
    ],
).images[0]
image.save("regions.png")
