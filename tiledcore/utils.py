"""Small helpers: attributes of one object and functions around its calls, names in profiles, copies to a device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache, partial, wraps
from threading import Lock, get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor

PREFIX = "tiledcore::"
LABELS = ("gather", "network", "attention", "blend", "pull", "step", "decode")

R = TypeVar("R")
Around = Callable[..., Any]  # ``around(call, *args, **kwargs)``; ``call`` takes the arguments of the object's own call
_AROUND = "_tiledcore_around"  # attribute: pairs of an Around and the thread whose calls it is for; None: all
_lock = Lock()
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


def intercept(owner: Any, around: Around, this_thread: bool = False) -> None:
    """From now on ``owner(...)`` is ``around(call, ...)``. The last one added is the outermost.

    The object gets a subclass of its class. Not another ``forward``: accelerate and diffusers put their own on a module
    and restore older ones. ``this_thread``: only for calls from this thread; another pipeline may share the network.
    """
    with _lock:
        stack = vars(owner).get(_AROUND, ())
        if not stack:
            owner.__class__ = _intercepted(type(owner))
        vars(owner)[_AROUND] = (*stack, (around, get_ident() if this_thread else None))


def release(owner: Any, around: Around) -> None:
    """Undo :func:`intercept`; does nothing if it was not done."""
    with _lock:
        stack = tuple(entry for entry in vars(owner).get(_AROUND, ()) if entry[0] is not around)
        if stack:
            vars(owner)[_AROUND] = stack
        elif vars(owner).pop(_AROUND, None) is not None:
            owner.__class__ = type(owner).__mro__[1]


def around_of(owner: Any, kind: type) -> Any:
    """The outermost function of that class around an object's calls from this thread, or None."""
    return next((around for around in reversed(_here(owner)) if isinstance(around, kind)), None)


def _here(owner: Any) -> tuple[Around, ...]:
    """The functions around calls from this thread, the outermost last."""
    return tuple(around for around, thread in vars(owner).get(_AROUND, ()) if thread in (None, get_ident()))


def _intercepted(kind: type) -> type:
    @wraps(kind.__call__)  # whoever reads the signature sees the object's own
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = partial(kind.__call__, self)
        for around in _here(self):
            inner = partial(around, inner)
        return inner(*args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__})


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
