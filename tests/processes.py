"""Run a function in several processes of a gloo group: forks of this one, so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

TIMEOUT = 60  # seconds


def on_ranks(count: int, work: Callable[[int], Any], timeout: float = TIMEOUT) -> list[Any]:
    """What ``work(rank)`` returned on each rank; the exception where it raised one, None where the process was killed.

    One rank is this process, without a group.
    """
    if count == 1:
        return [work(0)]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=_run, args=(folder, count, rank, work, timeout)) for rank in range(count)]
        for child in children:
            child.start()
        for child in children:
            child.join(2 * TIMEOUT)
            if child.is_alive():
                child.kill()
        files = [Path(folder) / str(rank) for rank in range(count)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _run(folder: str, count: int, rank: int, work: Callable[[int], Any], timeout: float) -> None:
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout))
    try:
        result = work(rank)
    except Exception as error:
        result = type(error)(str(error))
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
