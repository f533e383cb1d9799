"""ControlNet (UNets): a second network that sees a hint image, here the edges of --hint. It is cut to the tiles."""

import argparse

import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel
from PIL import Image

from tiledcore import TiledPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=1024, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--controlnet", help="a folder or a name on the hub; it must fit the model")
parser.add_argument("--hint", help="an image file; default: black")
args = parser.parse_args()

plain = TiledPipeline.from_pretrained(args.model).pipe
if args.controlnet:
    controlnet = ControlNetModel.from_pretrained(args.controlnet, torch_dtype=plain.dtype)
else:  # an untrained one, which changes nothing: only to show the call
    controlnet = ControlNetModel.from_unet(plain.unet)
pipe = TiledPipeline(AutoPipelineForText2Image.from_pipe(plain, controlnet=controlnet))
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

size = (args.size, args.size)
hint = Image.open(args.hint).convert("RGB").resize(size) if args.hint else Image.new("RGB", size)
image = pipe(
    "topographic map of a rugged coast",
    image=hint,
    height=args.size,
    width=args.size,
    num_inference_steps=args.steps,
    guidance_scale=3.0,
).images[0]
image.save("controlnet.png")
