"""tiledcore: one coherent image of any size from many tiles, denoised together.

The names below are imported on first use, so that ``import tiledcore`` costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_EXPORTS = {
    "Execution": "tiledcore.config",
    "Joint": "tiledcore.compose.connected",
    "Motion": "tiledcore.config",
    "Preview": "tiledcore.io.preview",
    "Pull": "tiledcore.schedulers.pull",
    "Region": "tiledcore.compose.regions",
    "Stage": "tiledcore.compose.stage_plan",
    "Staging": "tiledcore.compose.stage_plan",
    "TileGrid": "tiledcore.geometry",
    "TiledPipeline": "tiledcore.pipeline",
    "TilingConfig": "tiledcore.config",
    "apply_tiling": "tiledcore.hook",
    "connected": "tiledcore.compose.connected",
    "remove_tiling": "tiledcore.hook",
    "sample": "tiledcore.function",
    "tile": "tiledcore.function",
}
__all__ = [
    "Execution",
    "Joint",
    "Motion",
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
    "sample",
    "tile",
]

if TYPE_CHECKING:
    from tiledcore.compose.connected import Joint, connected
    from tiledcore.compose.regions import Region
    from tiledcore.compose.stage_plan import Stage, Staging
    from tiledcore.config import Execution, Motion, TilingConfig
    from tiledcore.function import sample, tile
    from tiledcore.geometry import TileGrid
    from tiledcore.hook import apply_tiling, remove_tiling
    from tiledcore.io.preview import Preview
    from tiledcore.pipeline import TiledPipeline
    from tiledcore.schedulers.pull import Pull


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tiledcore' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
