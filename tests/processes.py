"""Run a function in several processes of a gloo group: forks of this one, so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds


def on_ranks(count: int, work: Callable[[int], Any], timeout: float = TIMEOUT, group: bool = True) -> list[Any]:
    """What ``work(rank)`` returned on each rank; the exception where it raised one, None where the process was killed.

    One rank is this process, without a group. ``group=False``: the processes have torchrun's environment instead.
    """
    if count == 1:
        return [work(0)]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ports = context.SimpleQueue()
        start = _group(folder, count, timeout) if group else _environment(count, ports)
        children = [context.Process(target=_run, args=(folder, rank, work, start)) for rank in range(count)]
        for child in children:
            child.start()
        # As with torchrun, this process holds the store, so that it outlives all ranks. It is made after the last fork:
        # its thread could hold a lock of libc during a fork, and the new process would wait for that lock for ever.
        store = None if group else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        if store is not None:
            for _ in children:
                ports.put(store.port)
        for child in children:
            child.join(2 * TIMEOUT)
            if child.is_alive():
                child.kill()
        files = [Path(folder) / str(rank) for rank in range(count)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


Begin = Callable[[int], None]


def _group(folder: str, count: int, timeout: float) -> Begin:
    def begin(rank: int) -> None:
        store = dist.FileStore(f"{folder}/store", count)
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)

    return begin


def _environment(count: int, ports: Any) -> Begin:
    common = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def begin(rank: int) -> None:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own["MASTER_PORT"] = ports.get()
        os.environ.update(common | {name: str(value) for name, value in own.items()})

    return begin


def _run(folder: str, rank: int, work: Callable[[int], Any], begin: Begin) -> None:
    # After a fork, torch makes a new thread pool when it first needs one. It can fail ("Invalid thread pool!") if two
    # threads need it at the same time, as when transformers reads weights. So the pool is made here, by one thread.
    torch.set_num_threads(torch.get_num_threads())
    begin(rank)
    try:
        result = work(rank)
    except Exception as error:
        result = type(error)(str(error))
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
