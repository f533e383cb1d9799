"""Old name of ops/reference.py, until bench and tests/test_memory.py import from there."""

from tiledcore.ops.reference import _window as _window
from tiledcore.ops.reference import axis_weights as axis_weights
from tiledcore.ops.reference import blend_tiles as blend_tiles
