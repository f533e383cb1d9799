"""Run modules on fake tensors (shape and dtype, no data), and count live bytes and FLOPs.

The modules' real Python code runs, so the same tensors are alive at the same time as in a real run. Differences:

- Plain attention counts as a memory-efficient kernel: queries, keys, values and output, without the scores.
- ``neighbor_attention`` counts by its implementation: the kernels need no scratch, the others gather in chunks.
- Workspaces inside other kernels (cuDNN, cuBLAS, oneDNN) do not count; the planner's safety factor covers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from tiledcore import ops
from tiledcore.geometry import Pair
from tiledcore.ops.gathered_attention import CHUNK_BYTES
from tiledcore.ops.neighbor_attention import FASTEST, IMPLS
from tiledcore.vae.live_bytes import LiveBytes


@dataclass
class Simulated:
    """What was counted while modules ran on fake tensors."""

    live: LiveBytes
    counter: FlopCounterMode
    repeated: int = 0
    """FLOPs of calls that :meth:`once` did not run again."""

    @property
    def flops(self) -> int:
        return int(self.counter.get_total_flops()) + self.repeated

    def once(self, forward: Callable[..., tuple[Tensor]]) -> Callable[..., tuple[Tensor]]:
        """Run a network once for each shape of its first argument; later calls count what that one needed."""
        known: dict[torch.Size, tuple[torch.Size, int, int]] = {}

        def call(given: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            live, before = self.live, self.live.now
            if given.shape in known:
                shape, flops, more = known[given.shape]
                self.repeated += flops
                live.peak = max(live.peak, before + more)
                return (given.new_empty(shape),)
            flops, earlier = self.flops, live.reset()
            result = forward(given, *args, **kwargs)
            known[given.shape] = (result[0].shape, self.flops - flops, live.peak - before)
            live.peak = max(live.peak, earlier)
            return result

        return call


def build(make: Callable[[], torch.nn.Module], dtype: torch.dtype, mode: FakeTensorMode) -> torch.nn.Module:
    """Build a module with fake weights of a floating dtype, without data, in about a second."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with mode:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def simulated(mode: FakeTensorMode, modules: Sequence[torch.nn.Module], device: str) -> Iterator[Simulated]:
    """Run the ``with`` block on fake tensors and count.

    Args:
        mode: the mode in which the modules were built.
        modules: on the device from the beginning.
        device: the device to plan for, ``"cuda"`` or ``"cpu"``; the fake tensors are on the CPU.
    """
    most = attention_scratch(device)

    def scratch(func: Any, args: tuple[Any, ...]) -> int:
        attends = func.namespace == "tiledcore" and func._opname.startswith("neighbor_attention")
        return min(most, _gathered(*args)) if most and attends else 0

    live = LiveBytes(modules, scratch)
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with torch.no_grad(), mode, counter, live:
        yield Simulated(live, counter)


def attention_scratch(device: str) -> int:
    """The most scratch bytes of ``neighbor_attention``: 0 for the kernels, two chunks of windows where it gathers."""
    kernel: ops.Impl = "triton" if device == "cuda" else "native"
    gathers = device == "cuda" and FASTEST
    if not gathers and ops.unavailable("neighbor_attention", kernel, torch.device(device)) is None:
        return 0
    return 2 * CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"])


def _seen(size: int, tile: int, halo: int, wraps: bool) -> list[Pair]:
    """Per tile of one axis: (number of its queries, number of keys that they see)."""
    found = []
    for start in range(0, size, tile):
        end = min(start + tile, size)
        keys = end - start + 2 * halo if wraps else min(end + halo, size) - max(start - halo, 0)
        found.append((end - start, min(keys, size)))
    return found


def _gathered(q: Tensor, *arguments: Any) -> int:
    """Bytes of all queries, windows and results of ``neighbor_attention``, if ``"sdpa"`` gathered all at once."""
    canvas, tile, halo, wrap = arguments[5:9]
    keys = 1
    for axis in zip(canvas, tile, halo, wrap, strict=True):
        keys *= sum(seen for _, seen in _seen(*axis))
    return int(q[:, :1].nbytes * 2 * (canvas[0] * canvas[1] + keys))


def attention_pairs(canvas: Pair, tile: Pair, halo: Pair, wrap: tuple[bool, bool]) -> int:
    """The number of (query, key) pairs in neighbour attention, without global tokens."""
    total = 1
    for axis in zip(canvas, tile, halo, wrap, strict=True):
        total *= sum(queries * seen for queries, seen in _seen(*axis))
    return total


def _neighbor_attention_flops(q: Sequence[int], *arguments: Any, **_: Any) -> int:
    """FLOPs of two products (scores, and scores times values); a multiply-add counts as two."""
    batch, tokens, heads, dim = q
    global_k, (canvas, tile, halo, wrap) = arguments[3], arguments[5:9]
    pairs = attention_pairs(canvas, tile, halo, wrap) + tokens * (0 if global_k is None else global_k[1])
    return 4 * batch * heads * dim * pairs


def _cpu_attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


register_flop_formula([getattr(torch.ops.tiledcore, f"neighbor_attention_{impl}") for impl in IMPLS])(
    _neighbor_attention_flops
)
# torch has formulas only for its CUDA kernels.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}
