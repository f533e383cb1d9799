"""Ranks: the processes of a torch.distributed group, which share the tile batches of each step.

All processes make the same call (SPMD), and each holds the whole canvas. A process evaluates its part of the tile
batches; then all predictions are exchanged, and each process makes the same step. A tile batch is never cut, so the
image has the same bits for any number of processes. For the command, :func:`joined` and :func:`tells` know torchrun.
"""

import logging
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from tiledcore.hook import NetworkHook
from tiledcore.loop.checkpoint import Checkpoint, settings_of
from tiledcore.utils import replaced

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TIMEOUT = timedelta(minutes=30)  # of one message: a rank may decode and write for so long while others wait


class LostRankError(ConnectionError):
    """Another process ended, or did not answer within the group's timeout."""


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that evaluates each tile batch: the costliest first, each to the rank with the least work so far.

    At most 4/3 of the best possible time (Graham 1969). The same on every rank.
    """
    load, found = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[i] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[found[i]] += costs[i]
    return found


def few(calls: int) -> str:
    """What to do where a step has fewer calls of the network than there are ranks."""
    return (
        f"{calls} of them work{'s' * (calls == 1)} in a step, the others wait. In tile mode a smaller tile_batch or "
        "Execution(guidance_batch=False) uses more, for an image that is equal up to rounding"
    )


@dataclass
class Times:
    """What the ranks did in one call."""

    busy: list[float]  # Seconds in the network, by rank
    seconds: float = 0.0  # From the first tile batch to the end of the exchange, summed over the evaluations
    evaluations: int = 0
    received: int = 0  # Bytes of predictions that this rank got from the others

    @property
    def waiting(self) -> float:
        """Share of the time in which a rank waits for the others, mean over the ranks."""
        return max(0.0, 1 - sum(self.busy) / len(self.busy) / self.seconds) if self.seconds else 0.0

    @property
    def bytes_per_step(self) -> int:
        return self.received // max(1, self.evaluations)

    def __str__(self) -> str:
        busy = " ".join(f"{seconds:.1f}" for seconds in self.busy)
        return (
            f"{len(self.busy)} ranks: {busy} s in the network, {self.waiting:.0%} of the time spent waiting, "
            f"{self.bytes_per_step / 2**20:.2f} MiB received per step"
        )


class Ranks:
    """The processes of the default group, of which this is number ``rank``."""

    def __init__(self) -> None:
        self.world, self.rank, self.size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        # Messages between hosts, so that no device waits for them. All ranks come here at their first call.
        on_hosts = "cpu:gloo" in dist.get_backend_config()
        self.hosts = self.world if on_hosts else dist.new_group(backend="gloo")
        self.leads = self.rank == 0  # Whether this rank reads, writes and shows progress for all
        self.times = Times([0.0] * self.size)
        self.copied: TemporaryDirectory[str] | None = None  # Rank 0's checkpoint, for the call that is running

    def first(self, value: Any) -> Any:
        """Rank 0's value."""
        held = [value]
        with self._found():
            dist.broadcast_object_list(held, src=0, group=self.hosts)
        return held[0]

    def all(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        held: list[Any] = [None] * self.size
        with self._found():
            dist.all_gather_object(held, value, group=self.hosts)
        return held

    def deal(self, parts: Sequence[Any], run: Callable[[Any], Tensor], sample: Tensor) -> list[Tensor]:
        """Stands in for :func:`tiledcore.tiles.denoiser.run_all`; out of memory on one rank is so on all."""
        began = time.perf_counter()
        chosen = owners([math.prod(part.shape) for part in parts], self.size)
        if len(parts) < self.size and not self.times.evaluations:
            logger.warning("%d processes: %s", self.size, few(len(parts)))
        mine, full = list[Tensor](), False
        try:
            mine = [run(part) for part, owner in zip(parts, chosen, strict=True) if owner == self.rank]
        except torch.OutOfMemoryError:
            full = True
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[sample.element_size()]
        state = int(sample.contiguous().view(bits).sum(dtype=torch.int64))  # waits for the device
        channels, dtype = self._agree(full, mine, state, time.perf_counter() - began)
        sizes = [part.shape[0] * channels * part.shape[1] * part.shape[2] for part in parts]
        lengths = [[n for n, o in zip(sizes, chosen, strict=True) if o == rank] for rank in range(self.size)]
        try:
            own = torch.cat([out.flatten() for out in mine]) if mine else sample.new_empty(0, dtype=dtype)
            mine.clear()
            flat = self.share(own, [(sum(each),) for each in lengths])
        except torch.OutOfMemoryError as error:  # the others wait for this part: it is too late to try again
            raise RuntimeError(f"out of memory on rank {self.rank}, for the predictions of the others") from error
        self.times.received += sum(one.nbytes for rank, one in enumerate(flat) if rank != self.rank)
        self.times.seconds += time.perf_counter() - began
        self.times.evaluations += 1
        pieces = [iter(one.split(each)) for one, each in zip(flat, lengths, strict=True)]
        shapes = [(part.shape[0], channels, *part.shape[1:]) for part in parts]
        return [next(pieces[owner]).view(shape) for owner, shape in zip(chosen, shapes, strict=True)]

    def _agree(self, full: bool, mine: Sequence[Tensor], state: int, busy: float) -> tuple[int, torch.dtype]:
        """Tell all ranks how this one fared; returns channels and dtype of the predictions."""
        kind = (mine[0].shape[1], DTYPES.index(mine[0].dtype)) if mine else (0, 0)
        own = torch.tensor([full, *kind, state, int(busy * 1e9)], dtype=torch.int64)
        told = [torch.empty_like(own) for _ in range(self.size)]
        with self._found():
            dist.all_gather(told, own, group=self.hosts)
        rows = [row.tolist() for row in told]
        for rank, row in enumerate(rows):
            if row[0]:
                raise torch.OutOfMemoryError(f"out of memory on rank {rank}")
            if row[3] != rows[0][3]:
                raise RuntimeError(
                    f"rank {rank} has another canvas than rank 0: the processes run different code, or on devices "
                    "that round differently"
                )
        self.times.busy = [seconds + row[4] / 1e9 for seconds, row in zip(self.times.busy, rows, strict=True)]
        channels, dtype = max((row[1], row[2]) for row in rows)
        return channels, DTYPES[dtype]

    def share(self, own: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """The tensors of all ranks, of one dtype, on this rank's device; ``shapes`` of all, where they are known."""
        shapes = self.all(own.shape) if shapes is None else shapes
        flat = [own.new_empty(math.prod(shape)) for shape in shapes]
        flat[self.rank] = own.flatten()
        group = self.world if own.is_cuda else self.hosts
        with self._found():
            works = [
                dist.broadcast(one.view(torch.uint8), src=rank, group=group, async_op=True)
                for rank, one in enumerate(flat)
                if len(one)
            ]
            for work in works:
                work.wait()
        return [one.view(*shape) for one, shape in zip(flat, shapes, strict=True)]

    def turn(self, given: Tensor, got: Tensor, lengths: Sequence[int], got_lengths: Sequence[int]) -> None:
        """Each rank gives a part of ``given`` to each, by rank, and gets the others' in ``got``; both are flat."""
        sent, read = ([given.element_size() * n for n in each] for each in (lengths, got_lengths))
        with self._found():
            group = self.world if given.is_cuda else self.hosts
            dist.all_to_all_single(got.view(torch.uint8), given.view(torch.uint8), read, sent, group=group)

    def send(self, value: Any) -> None:
        """Give rank 0 a value, when it asks for it by :meth:`received`."""
        with self._found():
            dist.send_object_list([value], dst=0, group=self.hosts)

    def received(self, rank: int) -> Any:
        """What another rank sends."""
        held = [None]
        with self._found():
            dist.recv_object_list(held, src=rank, group=self.hosts)
        return held[0]

    @contextmanager
    def _found(self) -> Iterator[None]:
        """Around a message: one clear error where the others are gone."""
        try:
            yield
        except RuntimeError as error:
            raise LostRankError(
                f"another of the {self.size} processes ended, or did not answer in time; with a checkpoint, the same "
                "command goes on from there"
            ) from error


_ranks: Ranks | None = None


def current() -> Ranks | None:
    """The processes of the initialised default group; None where there is none, or only this process."""
    global _ranks
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if _ranks is None or _ranks.world is not dist.group.WORLD:
        _ranks = Ranks()
    return _ranks


@contextmanager
def sharing(ranks: Ranks, hook: NetworkHook) -> Iterator[None]:
    """Inside the ``with`` block, the tile batches of a call are dealt to the ranks; only rank 0 shows progress."""
    ranks.times, hook.denoiser.deal = Times([0.0] * ranks.size), ranks.deal
    shown = {} if ranks.leads else {"progress_bar": partial(tqdm, disable=True)}
    with replaced(hook.pipe, **shown):
        yield


def same_call(ranks: Ranks, pipe: Any, arguments: dict[str, Any], more: dict[str, Any]) -> None:
    """Compare versions, weights and arguments of all ranks, then give them rank 0's random state."""
    given = arguments.get("generator")
    generators: Sequence[Any] = given if isinstance(given, list | tuple) else [] if given is None else [given]
    rest = arguments | {"generator": None}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "generators": len(generators)}
    form = {name: arguments.get(name) for name in ("output_type", "return_dict")}
    told = ranks.all(settings_of(pipe, rest, {**versions, **form, **more}))
    for rank, settings in enumerate(told):
        for name in settings | told[0]:
            if settings.get(name) != told[0].get(name):
                raise ValueError(
                    f"parallel: all processes must make the same call, and {name} is {settings.get(name)} on rank "
                    f"{rank}, {told[0].get(name)} on rank 0"
                )
    own = [*generators, torch.default_generator]
    if torch.cuda.is_initialized():
        own.append(torch.cuda.default_generators[torch.cuda.current_device()])
    for generator, state in zip(own, ranks.first([one.get_state() for one in own]), strict=False):
        generator.set_state(state)


def options_of(ranks: Ranks, options: Any) -> Any:
    """A call's :class:`~tiledcore.call.Options` on this rank: only rank 0 writes previews, rows and checkpoints."""
    checkpoint, rows = options.checkpoint, options.rows
    if checkpoint is not None:
        there = ranks.leads and checkpoint.file.exists()
        saved = ranks.first(checkpoint.file.read_bytes() if there else None)
    if ranks.leads:
        return options
    if checkpoint is not None:  # a copy of what rank 0 has saved; nobody reads what this rank saves
        ranks.copied = TemporaryDirectory(prefix="tiledcore-")
        checkpoint = Checkpoint(Path(ranks.copied.name), every=2**62)
        if saved is not None:
            checkpoint.file.write_bytes(saved)
    if rows is not None:  # this rank decodes its part, and sends it to rank 0
        rows = partial(deque, maxlen=0)
    return replace(options, checkpoint=checkpoint, preview=None, rows=rows)


# ----------------------------------------------------------------------------- processes that torchrun started

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


def _end(*_: Any) -> NoReturn:
    raise LostRankError("another of the processes ended")


def tells() -> bool:
    """Whether this is the first process that tells of an error."""
    if _store is None:
        return os.environ.get("RANK") == "0"
    try:
        return bool(_store.add("tiledcore error", 1) == 1)
    except RuntimeError:  # the store is gone, with torchrun itself, or else with rank 0, which has told
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
