"""tiledcore: one coherent image of any size from many tiles, denoised together.

The names below are imported on first use, so that ``import tiledcore`` costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Joint": "tiledcore.joints",
    "Preview": "tiledcore.preview",
    "Pull": "tiledcore.pull",
    "Region": "tiledcore.regions",
    "Stage": "tiledcore.stage_plan",
    "Staging": "tiledcore.stage_plan",
    "TileGrid": "tiledcore.geometry",
    "TiledPipeline": "tiledcore.pipeline",
    "TilingConfig": "tiledcore.config",
    "apply_tiling": "tiledcore.tiling",
    "connected": "tiledcore.joints",
    "remove_tiling": "tiledcore.tiling",
}
__all__ = [
    "Joint",
    "Preview",
    "Pull",
    "Region",
    "Stage",
    "Staging",
    "TileGrid",
    "TiledPipeline",
    "TilingConfig",
    "__version__",
    "apply_tiling",
    "connected",
    "remove_tiling",
]

if TYPE_CHECKING:
    from tiledcore.config import TilingConfig
    from tiledcore.geometry import TileGrid
    from tiledcore.joints import Joint, connected
    from tiledcore.pipeline import TiledPipeline
    from tiledcore.preview import Preview
    from tiledcore.pull import Pull
    from tiledcore.regions import Region
    from tiledcore.stage_plan import Stage, Staging
    from tiledcore.tiling import apply_tiling, remove_tiling


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tiledcore' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
