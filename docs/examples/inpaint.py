"""Change a part of an image. Of the embedded models only earth-flux can do this."""

import argparse

import torch
from PIL import Image

from tiledcore import TiledPipeline
from tiledcore.models import call_defaults

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth-flux", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=512, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

pipe = TiledPipeline.from_pretrained(args.model)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

call = call_defaults(args.model) | {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
image = pipe("satellite view of desert", **call).images[0]
mask = Image.new("L", image.size)  # black: stays
mask.paste(255, (args.size // 4, args.size // 4, args.size * 3 // 4, args.size * 3 // 4))  # white: is drawn anew
changed = pipe("satellite view of islands in the ocean", image=image, mask_image=mask, strength=0.9, **call).images[0]
Image.composite(changed, image, mask).save("inpaint.png")  # outside the mask not even rounding changes
