"""tiledcore.sample: your own network and a scheduler, without a pipeline. Here the network is that of a pipeline."""

import argparse

import torch

from tiledcore import TiledPipeline, TilingConfig, sample

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=512, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

pipe = TiledPipeline.from_pretrained(args.model).pipe
text, empty = pipe.encode_prompt("topographic map of a rugged coast", "cpu", 1, True)


def predict(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """The guided prediction for tiles [N, C, h, w]; text and empty have one row for each of them."""
    both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([empty, text])).sample
    without, with_text = both.chunk(2)
    return without + 3.0 * (with_text - without)


side, native = args.size // pipe.vae_scale_factor, pipe.unet.config.sample_size
noise = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
pipe.scheduler.set_timesteps(args.steps)
latents = sample(predict, noise, pipe.scheduler, TilingConfig(tile=native, overlap=native // 4), text, empty)
with torch.no_grad():
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
pipe.image_processor.postprocess(decoded)[0].save("any_function.png")
