"""The embedded checkpoints: where they lie, how they are called, and what size they were made for."""

from pathlib import Path
from typing import Any

#: Stable-Diffusion-format folder that ``TiledPipeline.from_pretrained()`` opens by default.
EARTH = Path(__file__).parent / "earth"
#: Its transformer sibling, FLUX-format, with an autoencoder of its own.
EARTH_FLUX = Path(__file__).parent / "earth_flux"
EMBEDDED = {"earth": EARTH, "earth-flux": EARTH_FLUX}

#: Side of the images they were made for, in latent pixels: 256 px.
NATIVE = 32

_STEPS, _GUIDANCE = 12, 3.0


def call_defaults(name: str) -> dict[str, Any]:
    """Arguments of the pipeline's call that an embedded checkpoint was made for; {} for any other model."""
    if name == "earth":
        return {"num_inference_steps": _STEPS, "guidance_scale": _GUIDANCE}
    if name == "earth-flux":
        # True guidance, as it was trained with dropout and not distilled; 24 text tokens, as in training.
        return {
            "num_inference_steps": _STEPS,
            "true_cfg_scale": _GUIDANCE,
            "negative_prompt": "",
            "max_sequence_length": 24,
        }
    return {}
