"""Old name of ops/neighbor_attention.py, until simulation.py imports from there."""

from tiledcore.ops.neighbor_attention import _CHUNK_BYTES as _CHUNK_BYTES
from tiledcore.ops.neighbor_attention import _batches as _batches
