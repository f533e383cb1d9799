"""Methods of one object that are others for a while, so that what a pipeline calls changes without a copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Give an object attributes of its own for the length of a ``with`` block, whatever its class has by these names.

    Afterwards it has what it had: its own before, or none. Not by ``setattr``: a module's would register what is given.
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
