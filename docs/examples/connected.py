"""Two images whose edges fit: the right side of each continues in the left side of the other and of itself."""

import argparse

import torch
from PIL import Image

from tiledcore import Joint, TiledPipeline, connected

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=512, help="of each side of an image, in px")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

pipe = TiledPipeline.from_pretrained(args.model)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

images = connected(
    pipe,
    ["relief map of a rugged coast", "relief map of islands in the ocean"],
    [Joint("x", before=(0, 1), behind=(0, 1))],  # images by their numbers; "y" for one above the other
    height=args.size,
    width=args.size,
    num_inference_steps=args.steps,
    guidance_scale=3.0,
)
row = Image.new("RGB", (4 * args.size, args.size))
for place, number in enumerate((0, 1, 1, 0)):
    row.paste(images[number], (place * args.size, 0))
row.save("connected.png")
