"""Write the averaged weights as an ordinary diffusers folder in fp16.

``python -P -m tiledcore.models.training.export --kind unet``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from . import architecture
from .common import WORK
from .denoiser import FOLDERS
from .siblings import SIBLINGS


def load_vae(path: Path) -> Any:
    """The autoencoder that ``training.autoencoder`` saved: averaged weights."""
    vae = architecture.build_vae()
    vae.load_state_dict(torch.load(path, map_location="cpu")["ema"])
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)  # FLUX wants both, SD the first
    return vae.eval()


def export(kind: str, work: Path, out: Path, vae: Any) -> None:
    """Denoiser, text encoders, tokenizers, scheduler and ``vae`` as a pipeline's folder."""
    sibling = SIBLINGS[kind](work)
    sibling.model.load_state_dict(torch.load(work / f"{kind}.pt", map_location="cpu")["ema"])
    sibling.pipeline(vae).to(torch.float16).save_pretrained(out)
    # diffusers opens in float32 unless asked otherwise; transformers goes by what the config says.
    for config in out.glob("text_encoder*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=SIBLINGS, default="unet")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--vae", type=Path, help="diffusers folder; without it the one in training")
    parser.add_argument("--out", type=Path, help="default: the embedded model itself")
    args = parser.parse_args()
    if args.vae:
        from diffusers import AutoencoderKL

        vae: Any = AutoencoderKL.from_pretrained(args.vae)
    else:
        vae = load_vae(args.work / "vae.pt")
    export(args.kind, args.work, args.out or FOLDERS[args.kind], vae)


if __name__ == "__main__":
    main()
