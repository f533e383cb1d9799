"""Enlarge a photo four times on each side, and keep its colours. Without --photo the model makes a small one."""

import argparse

import torch
from PIL import Image

from tiledcore import TiledPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=1024, help="of each side of the result, in px")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--photo", help="an image file; without it, --size is the side of the result")
parser.add_argument("--prompt", default="satellite image of a coast", help="what the photo shows")
args = parser.parse_args()

pipe = TiledPipeline.from_pretrained(args.model)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

call = {"num_inference_steps": args.steps, "guidance_scale": 3.0}
if args.photo:
    photo = Image.open(args.photo).convert("RGB")
else:
    photo = pipe(args.prompt, height=args.size // 4, width=args.size // 4, **call).images[0]
width, height = (max(64, 4 * side // 64 * 64) for side in photo.size)
image = pipe(
    args.prompt,
    image=photo,
    height=height,
    width=width,
    stages="auto",  # from the photo to the size asked for, at most twice as large in each stage
    strength=0.4,  # how much is drawn anew
    keep_colour=True,
    **call,
).images[0]
image.save("photo_x4.png")
