"""The public ops. ``impl=`` names an implementation: it is used, or an error says why not."""

from tiledcore.ops.blend_tiles import blend_tiles
from tiledcore.ops.checks import WINDOWS, Window
from tiledcore.ops.dispatch import Impl, choose, unavailable
from tiledcore.ops.fused_step import fused_step, guidance_rescale
from tiledcore.ops.gather_tiles import gather_tiles
from tiledcore.ops.group_norm_silu import group_norm_silu
from tiledcore.ops.neighbor_attention import neighbor_attention

__all__ = [
    "WINDOWS",
    "Impl",
    "Window",
    "blend_tiles",
    "choose",
    "fused_step",
    "gather_tiles",
    "group_norm_silu",
    "guidance_rescale",
    "neighbor_attention",
    "unavailable",
]
