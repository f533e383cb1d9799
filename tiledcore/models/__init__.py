"""The embedded checkpoints: where they lie, how they are called, and the scripts that made them."""

from pathlib import Path
from typing import Any

#: Stable-Diffusion-format folder that ``TiledPipeline.from_pretrained()`` opens by default.
EARTH = Path(__file__).parent / "earth"
#: Its transformer sibling, FLUX-format. It has no autoencoder of its own: it shares that of EARTH.
EARTH_FLUX = Path(__file__).parent / "earth_flux"
#: Side of the pictures that both were trained at, in latent pixels: 256 px.
NATIVE = 32
EMBEDDED = {"earth": EARTH, "earth-flux": EARTH_FLUX}

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
