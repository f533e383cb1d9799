"""Join the processes that torchrun started, choose this one's device, and say who tells of an error."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tiledcore.parallel.ranks import Ranks, current

TIMEOUT = timedelta(minutes=30)  # of one message: a rank may decode and write for so long while others wait

_store: Any = None  # torchrun's own, which outlives each of the processes


@contextmanager
def joined(device: str | None) -> Iterator[Ranks]:
    """Inside the ``with`` block, the processes of torchrun are one group.

    ``device`` None or ``"cuda"``: each process of a host takes a CUDA device of its own, if there are any; ValueError
    where they are too few. Another, such as ``"cuda:0"``, is shared by all of them.
    """
    global _store
    signal.signal(signal.SIGTERM, _end)
    cuda = device in (None, "cuda") and torch.cuda.is_available()
    if cuda:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"torchrun: {os.environ['LOCAL_WORLD_SIZE']} processes on a host with {count} CUDA devices; give "
                f"--nproc-per-node {count}, or let them share one by --device cuda:0"
            )
        torch.cuda.set_device(local)
    _store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    group = dist.PrefixStore("tiledcore", _store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=TIMEOUT)
    if rank > 0:
        logging.getLogger("tiledcore").setLevel(logging.ERROR)
    ranks = current()
    assert ranks is not None
    yield ranks
    dist.destroy_process_group()  # after an error the others may be gone, and this would wait for them


class EndedError(Exception):
    """Torchrun ended this process, because another one ended."""


def _end(*_: Any) -> NoReturn:
    raise EndedError("another of the processes ended")


def tells() -> bool:
    """Whether this is the first process that tells of an error."""
    if _store is None:
        return os.environ.get("RANK") == "0"
    try:
        return bool(_store.add("tiledcore error", 1) == 1)
    except RuntimeError:  # torchrun itself is gone
        return True
