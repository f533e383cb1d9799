"""The tilings that tests use. Only this file and the tests of TilingConfig itself spell its arguments out."""

from typing import Any

from tiledcore import TilingConfig


def still(tile: Any = 16, overlap: Any = None, **more: Any) -> TilingConfig:
    """Overlapping tiles that stay where they are. Sizes in latent pixels."""
    return TilingConfig(tile=tile, overlap=overlap, **more)


def moving(tile: Any = 16, **more: Any) -> TilingConfig:
    """A partition that lies elsewhere in every step; ``blend_first``, ``blend_steps`` and ``fade`` among ``more``."""
    return TilingConfig(tile=tile, shift=True, **more)


def canvas_mode(tile: Any = 16, **more: Any) -> TilingConfig:
    """One network call over the whole canvas."""
    return TilingConfig(tile=tile, mode="canvas", **more)


ONE = still()
"""The default overlap: an eighth of the tile."""
RAMP = still(overlap=4)
MOVING = moving()
FADING = moving(fade=3)
BLENDED = moving(blend_steps=2, overlap=4)
CANVAS = canvas_mode()
