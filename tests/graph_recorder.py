"""A double of a CUDA graph that records the ATen calls of a step and repeats them on the same tensors."""

from typing import Any

import torch
from runs import Double
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiledcore.loop.graph import Body


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recording(TorchDispatchMode):
    """While active: runs and notes every call, and what tensors held that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(given.get(argument.name)):
                    self._keep(tensor)
        result = func(*args, **kwargs)
        old = {storage(tensor) for tensor in tensors((args, kwargs))}
        self._made |= {storage(tensor) for tensor in tensors(result)} - old
        self.calls.append((func, args, kwargs, result))
        return result

    def _keep(self, tensor: Tensor) -> None:
        key = storage(tensor)
        if key not in self._made and key not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._before[key] = (whole, whole.clone())

    def restore(self) -> None:
        """A capture runs nothing: put back what was changed."""
        for whole, before in self._before.values():
            whole.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            old = {storage(tensor) for tensor in tensors((args, kwargs))}
            for into, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                if storage(into) not in old:  # else it is a view, or was changed in place
                    into.copy_(new)


class Recorder(Double):
    """Graphs as recordings."""

    def capture(self, body: Body) -> Body:
        with Recording() as recording:
            body()
        recording.restore()
        self.replays.add(recording.replay)
        return recording.replay
