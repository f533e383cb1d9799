"""Count the bytes of the tensors that are alive while code runs; works on real, meta and fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts each tensor storage made inside the ``with`` block, until nothing refers to it any more.

    Tensors of the meta device have no data and count only with ``meta``.
    Older tensors count only if they belong to ``modules``; what a kernel allocates and frees itself is not seen.
    ``now`` is the bytes alive now, ``peak`` the most alive at once since the last :meth:`reset`.

    ``scratch(operation, its arguments)`` gives the bytes that it needs only while it runs.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module] = (),
        scratch: Callable[[Any, tuple[Any, ...]], int] = lambda *_: 0,
        meta: bool = False,
    ) -> None:
        super().__init__()
        self.scratch, self.meta = scratch, meta
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._add(tensor)

    def reset(self) -> int:
        """Start a new peak; returns the old one."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if new := [t for t in _tensors(result) if _key(t) not in self._alive]:
            given = {_key(t) for t in _tensors((args, kwargs))}
            for tensor in new:
                if _key(tensor) not in given:  # else it is a view of an older tensor
                    self._add(tensor)
        self.peak = max(self.peak, self.now + self.scratch(func, args))
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._alive or (tensor.is_meta and not self.meta):
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
