"""Old name of ops/fused_step.py, until eligible.py and engine.py import from there."""

from tiledcore.ops.fused_step import MAX_SLOTS as MAX_SLOTS
from tiledcore.ops.fused_step import guidance_rescale as guidance_rescale
