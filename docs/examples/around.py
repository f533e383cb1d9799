"""An image around the horizon: its left and right sides fit together. Rolled by half, so that the joint shows."""

import argparse

import torch
from PIL import ImageChops

from tiledcore import TiledPipeline, TilingConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=1024, help="width, in px; the height is half of it")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

pipe = TiledPipeline.from_pretrained(args.model)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

image = pipe(
    "relief map of islands in the ocean",
    height=args.size // 2,
    width=args.size,
    num_inference_steps=args.steps,
    guidance_scale=3.0,
    tiling=TilingConfig(motion="moving", wrap=(False, True)),  # (y, x)
).images[0]
image.save("around.png")
ImageChops.offset(image, args.size // 2, 0).save("around_rolled.png")
