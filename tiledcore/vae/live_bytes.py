"""Count the bytes of the tensors that are alive while code runs; works on real, meta and fake tensors."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
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
        self._add(self._storages([[*module.parameters(), *module.buffers()] for module in modules]))

    def reset(self) -> int:
        """Start a new peak; returns the old one."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if new := {key: one for key, one in self._storages(result).items() if key not in self._alive}:
            given = self._storages((args, kwargs))  # a tensor that shares one of these is a view of an older one
            self._add({key: one for key, one in new.items() if key not in given})
        self.peak = max(self.peak, self.now + self.scratch(func, args))
        return result

    def _add(self, storages: dict[int, Any]) -> None:
        for key, storage in storages.items():
            self._alive[key] = weakref.ref(storage, partial(self._gone, key, storage.nbytes()))
            self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self._alive[key]
        self.now -= size

    def _storages(self, value: Any) -> dict[int, Any]:
        """The storages of the tensors in a structure that count, by their address."""
        tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and (self.meta or not leaf.is_meta))
        return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
