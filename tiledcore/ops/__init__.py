"""The public ops. Each takes ``impl=``: what is named is used or refused, never replaced."""

from tiledcore.ops.attention import neighbor_attention
from tiledcore.ops.checks import WINDOWS, Window
from tiledcore.ops.dispatch import Impl, choose, unavailable
from tiledcore.ops.norm import group_norm_silu
from tiledcore.ops.step import fused_step, guidance_rescale
from tiledcore.ops.tiles import blend_tiles, gather_tiles

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
