"""Run a function of ours around every call of one object, such as a network or a pipeline.

``accelerate`` and diffusers put their own ``forward`` on a module and restore older ones, so ``forward`` cannot hold
anything of ours. Instead the object gets a subclass of its class whose ``__call__`` runs our functions first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from threading import Lock, get_ident
from typing import Any

Around = Callable[..., Any]  # ``around(call, *args, **kwargs)``; ``call`` takes the arguments of the object's own call

_NAME = "_tiledcore_around"  # attribute -> pairs of a function and the thread whose calls it is for; None: all
_lock = Lock()


def intercept(owner: Any, around: Around, this_thread: bool = False) -> None:
    """From now on ``owner(...)`` is ``around(call, ...)``. The last one added is the outermost.

    ``this_thread``: only for calls from this thread; another one may have a pipeline that shares the network.
    """
    with _lock:
        stack = vars(owner).get(_NAME, ())
        if not stack:
            owner.__class__ = _intercepted(type(owner))
        vars(owner)[_NAME] = (*stack, (around, get_ident() if this_thread else None))


def release(owner: Any, around: Around) -> None:
    """Undo :func:`intercept`; does nothing if it was not done."""
    with _lock:
        stack = tuple(entry for entry in vars(owner).get(_NAME, ()) if entry[0] is not around)
        if stack:
            vars(owner)[_NAME] = stack
        elif vars(owner).pop(_NAME, None) is not None:
            owner.__class__ = type(owner).__mro__[1]


def around_of(owner: Any, kind: type) -> Any:
    """The outermost function of that class around an object's calls from this thread, or None."""
    return next((around for around in reversed(_here(owner)) if isinstance(around, kind)), None)


def _here(owner: Any) -> tuple[Around, ...]:
    """The functions around calls from this thread, the outermost last."""
    return tuple(around for around, thread in vars(owner).get(_NAME, ()) if thread in (None, get_ident()))


def _intercepted(kind: type) -> type:
    @wraps(kind.__call__)  # whoever reads the signature sees the object's own
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = partial(kind.__call__, self)
        for around in _here(self):
            inner = partial(around, inner)
        return inner(*args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__})
