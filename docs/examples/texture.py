"""A texture that repeats without a seam, and four copies of it side by side."""

import argparse

import torch
from PIL import Image

from tiledcore import TiledPipeline, TilingConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=512, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

pipe = TiledPipeline.from_pretrained(args.model)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

image = pipe(
    "satellite image of a desert",
    height=args.size,
    width=args.size,
    num_inference_steps=args.steps,
    guidance_scale=3.0,
    tiling=TilingConfig(motion="moving", wrap=True),
).images[0]
image.save("texture.png")
four = Image.new("RGB", (2 * args.size, 2 * args.size))
for x in (0, args.size):
    for y in (0, args.size):
        four.paste(image, (x, y))
four.save("texture_four.png")
