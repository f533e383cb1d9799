"""The embedded default checkpoint: where it lies, and the scripts that made it."""

from pathlib import Path

#: Stable-Diffusion-format folder that ``TiledPipeline.from_pretrained()`` opens by default.
EARTH = Path(__file__).parent / "earth"
