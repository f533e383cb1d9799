"""One large image: made small first, then enlarged and refined, so that it has one composition."""

import argparse

import torch

from tiledcore import TiledPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=1024, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

pipe = TiledPipeline.from_pretrained(args.model)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

image = pipe(
    "topographic map of a rugged coast",
    height=args.size,
    width=args.size,
    num_inference_steps=args.steps,
    guidance_scale=3.0,  # what the embedded model was made for
    stages="auto",
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("large_image.png")
