"""tiledcore: one coherent image of any size from many tiles, denoised together.

The names below are imported on first use, so that ``import tiledcore`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:  # for type checkers and editors, which do not run ``__getattr__``
    from tiledcore.compose.connected import Joint as Joint
    from tiledcore.compose.connected import connected as connected
    from tiledcore.compose.regions import Region as Region
    from tiledcore.compose.stages import Stage as Stage
    from tiledcore.compose.stages import Staging as Staging
    from tiledcore.config import Execution as Execution
    from tiledcore.config import Motion as Motion
    from tiledcore.config import TilingConfig as TilingConfig
    from tiledcore.function import sample as sample
    from tiledcore.function import tile as tile
    from tiledcore.geometry import TileGrid as TileGrid
    from tiledcore.hook import apply_tiling as apply_tiling
    from tiledcore.hook import remove_tiling as remove_tiling
    from tiledcore.io.preview import Preview as Preview
    from tiledcore.pipeline import TiledPipeline as TiledPipeline
    from tiledcore.schedulers.pull import Pull as Pull

_NAMES = {
    "compose.connected": ("Joint", "connected"),
    "compose.regions": ("Region",),
    "compose.stages": ("Stage", "Staging"),
    "config": ("Execution", "Motion", "TilingConfig"),
    "function": ("sample", "tile"),
    "geometry": ("TileGrid",),
    "hook": ("apply_tiling", "remove_tiling"),
    "io.preview": ("Preview",),
    "pipeline": ("TiledPipeline",),
    "schedulers.pull": ("Pull",),
}
_MODULE_OF = {name: f"tiledcore.{module}" for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tiledcore' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
