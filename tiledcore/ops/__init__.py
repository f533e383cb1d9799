"""The ops. ``impl=`` names an implementation of :data:`Impl`: it is used, or an error says why not; None: the fastest.

Errors of all ops:

- TypeError: an argument is not a tensor, or has another dtype.
- ValueError: a shape, size, device, value or ``impl`` is not as described.
- RuntimeError: the named ``impl`` cannot run here.

Values of tensors are checked on the CPU only, because reading them would wait for a GPU. No op has a gradient.
"""

from tiledcore.ops.blend_tiles import blend_tiles as blend_tiles
from tiledcore.ops.dispatch import WINDOWS as WINDOWS
from tiledcore.ops.dispatch import Impl as Impl
from tiledcore.ops.dispatch import Window as Window
from tiledcore.ops.dispatch import choose as choose
from tiledcore.ops.dispatch import unavailable as unavailable
from tiledcore.ops.fused_step import fused_step as fused_step
from tiledcore.ops.gather_tiles import gather_tiles as gather_tiles
from tiledcore.ops.group_norm_silu import group_norm_silu as group_norm_silu
from tiledcore.ops.neighbor_attention import neighbor_attention as neighbor_attention
