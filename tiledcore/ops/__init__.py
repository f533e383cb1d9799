"""The public ops. Each takes ``impl=``: what is named is used or refused, never replaced."""

from tiledcore.ops.dispatch import Impl, choose, unavailable
from tiledcore.ops.tiles import WINDOWS, Window, blend_tiles, gather_tiles

__all__ = ["WINDOWS", "Impl", "Window", "blend_tiles", "choose", "gather_tiles", "unavailable"]
