"""The tilings that tests use. Only this file and the tests of TilingConfig itself spell its arguments out."""

from typing import Any

from tiledcore import Motion, TilingConfig


def still(tile: Any = 16, overlap: Any = None, **more: Any) -> TilingConfig:
    """Overlapping tiles that stay where they are. Sizes in latent pixels."""
    return TilingConfig(tile=tile, overlap=overlap, **more)


def moving(tile: Any = 16, **more: Any) -> TilingConfig:
    """A partition that lies elsewhere in every step; ``blend_first``, ``blend_last`` and ``fade`` among ``more``."""
    motion = {name: more.pop(name) for name in ("blend_first", "blend_last", "fade", "seed") if name in more}
    return TilingConfig(tile=tile, motion=Motion(**{"blend_first": 0, "blend_last": 0, "fade": 0} | motion), **more)


def canvas_mode(tile: Any = 16, **more: Any) -> TilingConfig:
    """One network call over the whole canvas."""
    return TilingConfig(tile=tile, mode="canvas", **more)


ONE = still()
"""The default overlap: an eighth of the tile."""
RAMP = still(overlap=4)
MOVING = moving()
FADING = moving(fade=3)
BLENDED = moving(blend_last=2, overlap=4)
CANVAS = canvas_mode()
