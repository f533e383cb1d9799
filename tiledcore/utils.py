"""Small helpers: attributes of an object for a while, names in profiles, copies to a device and what is kept there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

PREFIX = "tiledcore::"
LABELS = ("gather", "network", "attention", "blend", "pull", "step", "decode")

R = TypeVar("R")
_used: ContextVar[list[Any] | None] = ContextVar("used", default=None)


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes on one object inside a ``with`` block; afterwards it has what it had, its own or none.

    Not by ``setattr``: a module's would register what is given.
    """
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. From the host to a GPU by pinned memory, so that nobody waits."""
    if tensor.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def remembered(make: Callable[..., R]) -> Callable[..., R]:
    """Remember the last 64 results of a function, which are tensors on a device. See :func:`using`."""
    cached = lru_cache(maxsize=64)(make)

    @wraps(make)
    def get(*key: Any) -> R:
        result = cached(*key)
        if (used := _used.get()) is not None:
            used.append(result)
        return result

    return get


@contextmanager
def using() -> Iterator[list[Any]]:
    """Collect what :func:`remembered` functions return inside a ``with`` block.

    A CUDA graph that is captured there reads these tensors at each replay, also when they are remembered no longer.
    """
    used: list[Any] = []
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


@contextmanager
def label(name: str) -> Iterator[None]:
    """Name what runs inside in profiles, as one of :data:`LABELS`. Costs about a microsecond when nobody profiles."""
    nvtx = torch.cuda.nvtx.range(PREFIX + name) if torch.cuda.is_available() else nullcontext()
    with nvtx, torch.profiler.record_function(PREFIX + name):
        yield


@contextmanager
def labelled(owner: Any, method: str, name: str) -> Iterator[None]:
    """Name all calls of a method of one object in profiles; afterwards the object is as it was."""
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        with label(name):
            return original(*args, **kwargs)

    with replaced(owner, **{method: call}):
        yield
