"""A prompt for each tile, from where the tile lies in the image."""

import argparse

import torch

from tiledcore import TiledPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=1024, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()


def prompt(box: tuple[int, int, int, int]) -> str | None:
    """The prompt of the tile (left, top, right, bottom), in px; None is the prompt of the call."""
    left, _, right, _ = box
    return "islands in the ocean" if left + right < args.size else None


pipe = TiledPipeline.from_pretrained(args.model)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

image = pipe(
    "mountains with snow",
    height=args.size,
    width=args.size,
    num_inference_steps=args.steps,
    guidance_scale=3.0,
    prompt_for_tile=prompt,
).images[0]
image.save("tile_prompts.png")
