"""Execution without data: modules on fake tensors, with their live bytes and their FLOPs counted.

torch's ``FakeTensorMode`` runs the real Python code of a module on tensors that have a shape and a dtype but no
storage. What is alive at which moment is then the same as in a real run, because it is Python and the dispatcher
that hold tensors, not the kernels. Three things differ between kernels, and are counted as follows:

- Plain attention as a memory-efficient kernel (Rabe and Staats 2021; Dao et al. 2022): queries, keys, values and the
  output, and no scores of ``N**2``. Both torch's CUDA kernels for half precision and its CPU kernel are such.
- ``neighbor_attention`` by its implementation: the kernels have no scratch; ``"sdpa"`` gathers windows in chunks.
- Workspaces inside other kernels (cuDNN's, cuBLAS', oneDNN's) are not counted: they are what a safety factor is for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from tiledcore import ops
from tiledcore.geometry import Pair
from tiledcore.ops.neighbor_attention import _CHUNK_BYTES

_ATTENTION = {
    impl: getattr(torch.ops.tiledcore, f"neighbor_attention_{impl}")
    for impl in ("reference", "native", "triton", "sdpa")
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages that are alive, as a context around real or fake execution.

    A storage counts from the operation that returns it until nothing refers to it any more; views count once.
    What a kernel allocates and frees within one operation is not seen.

    Args:
        modules: whose parameters and buffers are alive from the beginning.
        scratch: most bytes that a ``neighbor_attention`` takes while it runs.
    """

    def __init__(self, modules: Sequence[torch.nn.Module] = (), scratch: int = 0) -> None:
        super().__init__()
        self.scratch = scratch
        self.now = 0
        self.peak = 0
        """The most that was alive since the last :meth:`reset`."""
        self._alive: dict[int, weakref.ref[Any]] = {}
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is not yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def reset(self) -> int:
        """Start a new phase; returns the peak of the one that ends."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        if self.scratch and func.namespace == "tiledcore" and func._opname.startswith("neighbor_attention"):
            self.peak = max(self.peak, self.now + min(self.scratch, _gathered(*args)))
        return out


def _gathered(q: Tensor, *arguments: Any) -> int:
    """Bytes of all queries, windows and results of ``neighbor_attention`` as ``"sdpa"`` gathers them, in one chunk."""
    canvas, tile, halo, wrap = arguments[5:9]
    seen = 1
    for size, t, h, wraps in zip(canvas, tile, halo, wrap, strict=True):
        starts = range(0, size, t)
        seen *= sum(
            min(size, min(t, size - start) + 2 * h) if wraps else min(start + t + h, size) - max(start - h, 0)
            for start in starts
        )
    return int(q[:, :1].nbytes * 2 * (canvas[0] * canvas[1] + seen))


@dataclass
class Simulated:
    """Modules on fake tensors, and what their execution was counted to take."""

    device: str
    """Type of the device that is planned for, ``"cuda"`` or ``"cpu"``; the fake tensors are on the CPU."""
    mode: FakeTensorMode
    live: LiveBytes
    counter: FlopCounterMode

    @property
    def flops(self) -> int:
        return int(self.counter.get_total_flops())


def build(make: Any, dtype: torch.dtype, mode: FakeTensorMode) -> torch.nn.Module:
    """Make a module with fake weights of one dtype: no data, no initialisation, in about a second.

    Args:
        make: makes the module.
        dtype: floating-point dtype of its weights.
        mode: of its weights, and of every later execution.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with mode:
            module: torch.nn.Module = make().eval().requires_grad_(False)
            return module
    finally:
        torch.set_default_dtype(before)


@contextmanager
def simulated(mode: FakeTensorMode, modules: Sequence[torch.nn.Module], device: str) -> Iterator[Simulated]:
    """Execute on fake tensors and count.

    Args:
        mode: that the modules were built in.
        modules: that are on the device from the beginning.
        device: type of the device that is planned for.
    """
    live = LiveBytes(modules, attention_scratch(device))
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with torch.no_grad(), mode, counter, live:
        yield Simulated(device, mode, live, counter)


def attention_scratch(device: str) -> int:
    """Bytes that ``neighbor_attention`` needs beside its arguments and its result, by what it runs on.

    The kernels need none. ``"sdpa"`` has one chunk of gathered windows in use while it gathers the next.
    """
    kernel: ops.Impl = "triton" if device == "cuda" else "native"
    if ops.unavailable("neighbor_attention", kernel, torch.device(device)) is None:
        return 0
    return 2 * _CHUNK_BYTES.get(device, _CHUNK_BYTES["cpu"])


def attention_pairs(canvas: Pair, tile: Pair, halo: Pair, wrap: tuple[bool, bool]) -> int:
    """How many (query, key) pairs neighbour attention scores, global tokens not among them."""
    total = 1
    for size, t, h, wraps in zip(canvas, tile, halo, wrap, strict=True):
        pairs = 0
        for start in range(0, size, t):
            end = min(start + t, size)
            seen = end - start + 2 * h if wraps else min(end + h, size) - max(start - h, 0)
            pairs += (end - start) * min(seen, size)
        total *= pairs
    return total


def _neighbor_attention_flops(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    global_q: Sequence[int] | None,
    global_k: Sequence[int] | None,
    global_v: Sequence[int] | None,
    canvas: Pair,
    tile: Pair,
    halo: Pair,
    wrap: tuple[bool, bool],
    *_: Any,
    **__: Any,
) -> int:
    """Two products (scores, and scores by values) of two FLOPs a multiply-add, as for plain attention."""
    batch, tokens, heads, dim = q
    pairs = attention_pairs(canvas, tile, halo, wrap) + tokens * (0 if global_k is None else global_k[1])
    return 4 * batch * heads * dim * pairs


def _cpu_attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


register_flop_formula(list(_ATTENTION.values()))(_neighbor_attention_flops)
# torch has formulas for its CUDA kernels alone.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}
