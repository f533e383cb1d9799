"""Ranks: the processes of a torch.distributed group, which share the tile batches of each step. Sharing: their call.

All processes make the same call (SPMD), and each holds the whole canvas. A process evaluates its part of the tile
batches; then all predictions are exchanged, and each process makes the same step. A tile batch is never cut, so the
image has the same bits for any number of processes.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from tiledcore.feature import Feature
from tiledcore.hook import NetworkHook
from tiledcore.loop.checkpoint import FILE, Checkpoint, settings_of
from tiledcore.loop.engine import Report
from tiledcore.utils import replaced

logger = logging.getLogger(__name__)

SENT = 256  # rows of an image in one message
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
        self.times = Times([0.0] * self.size)

    @property
    def leads(self) -> bool:
        """Whether this rank reads, writes and shows progress for all."""
        return self.rank == 0

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

    def first_state(self, generators: Sequence[torch.Generator]) -> None:
        """Set torch's own generators, and these, to the state that they have on rank 0."""
        cuda = torch.cuda.is_initialized()
        own = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if cuda else None,
            [one.get_state() for one in generators],
        )
        cpu, gpu, given = self.first(own)
        torch.set_rng_state(cpu)
        if cuda and gpu is not None:
            torch.cuda.set_rng_state(gpu)
        for generator, state in zip(generators, given, strict=True):
            generator.set_state(state)

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
        state = _checksum(sample)  # waits for the device
        channels, dtype = self._agree(full, mine, state, time.perf_counter() - began)
        sizes = [part.shape[0] * channels * part.shape[1] * part.shape[2] for part in parts]
        lengths = [[n for n, o in zip(sizes, chosen, strict=True) if o == rank] for rank in range(self.size)]
        try:
            flat = [torch.empty(sum(each), dtype=dtype, device=sample.device) for each in lengths]
            if mine:
                torch.cat([out.flatten() for out in mine], out=flat[self.rank])
        except torch.OutOfMemoryError as error:  # the others wait for this part: it is too late to try again
            raise RuntimeError(f"out of memory on rank {self.rank}, for the predictions of the others") from error
        mine.clear()
        self._exchange(flat)
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
        if any(row[0] for row in rows):
            which = next(rank for rank, row in enumerate(rows) if row[0])
            raise torch.OutOfMemoryError(f"out of memory on rank {which}")
        others = [rank for rank, row in enumerate(rows) if row[3] != rows[0][3]]
        if others:
            raise RuntimeError(
                f"rank {others[0]} has another canvas than rank 0: the processes run different code, or on devices "
                "that round differently"
            )
        self.times.busy = [seconds + row[4] / 1e9 for seconds, row in zip(self.times.busy, rows, strict=True)]
        channels, dtype = max((row[1], row[2]) for row in rows)
        return channels, DTYPES[dtype]

    def _exchange(self, flat: Sequence[Tensor]) -> None:
        """Each rank gives its part to all others."""
        group = self.world if flat[0].is_cuda else self.hosts
        with self._found():
            works = [
                dist.broadcast(one.view(torch.uint8), src=rank, group=group, async_op=True)
                for rank, one in enumerate(flat)
                if len(one)
            ]
            for work in works:
                work.wait()

    def share(self, own: Tensor, alike: bool = False) -> list[Tensor]:
        """The tensors of all ranks, of one dtype, on this rank's device. ``alike``: all have the shape of ``own``."""
        shapes = [own.shape] * self.size if alike else self.all(own.shape)
        flat = [torch.empty(math.prod(shape), dtype=own.dtype, device=own.device) for shape in shapes]
        flat[self.rank].copy_(own.flatten())
        self._exchange(flat)
        return [one.view(shape) for one, shape in zip(flat, shapes, strict=True)]

    def turn(self, given: Tensor, lengths: Sequence[int], got: Tensor, got_lengths: Sequence[int]) -> None:
        """Each rank gives a part of ``given`` to each, by rank, and gets the others' in ``got``; both are flat."""
        item = given.element_size()
        sizes = [item * length for length in got_lengths], [item * length for length in lengths]
        with self._found():
            group = self.world if given.is_cuda else self.hosts
            dist.all_to_all_single(got.view(torch.uint8), given.view(torch.uint8), *sizes, group=group)

    def send(self, rows: Tensor) -> None:
        """Send rows ``[B, C, H, W]`` to rank 0, some at a time, as it asks for them."""
        with self._found():
            dist.send(torch.tensor([*rows.shape, DTYPES.index(rows.dtype)]), dst=0, group=self.hosts)
            for piece in rows.split(SENT, dim=2):
                dist.send(piece.contiguous().flatten().view(torch.uint8), dst=0, group=self.hosts)

    def received(self, rank: int) -> Iterator[Tensor]:
        """What another rank sends, on the host."""
        header = torch.empty(5, dtype=torch.int64)
        with self._found():
            dist.recv(header, src=rank, group=self.hosts)
        *batch, height, width, dtype = header.tolist()
        for start in range(0, height, SENT):
            piece = torch.empty(*batch, min(SENT, height - start), width, dtype=DTYPES[dtype])
            with self._found():
                dist.recv(piece.flatten().view(torch.uint8), src=rank, group=self.hosts)
            yield piece

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


def _checksum(canvas: Tensor) -> int:
    """The sum of the canvas' bits as integers."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[canvas.element_size()]
    return int(canvas.contiguous().view(bits).sum(dtype=torch.int64))


_ranks: Ranks | None = None


def current() -> Ranks | None:
    """The processes of the initialised default group; None where there is none, or only this process."""
    global _ranks
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if _ranks is None or _ranks.world is not dist.group.WORLD:
        _ranks = Ranks()
    return _ranks


class Sharing(Feature):
    """The tile batches of one call are dealt to the ranks; only rank 0 shows progress."""

    def __init__(self, ranks: Ranks, pipe: Any, hook: NetworkHook) -> None:
        self.ranks, self.pipe, self.hook = ranks, pipe, hook

    def enter(self, stack: ExitStack) -> None:
        self.ranks.times = Times([0.0] * self.ranks.size)
        self.hook.denoiser.deal = self.ranks.deal
        if not self.ranks.leads:
            stack.enter_context(replaced(self.pipe, progress_bar=partial(tqdm, disable=True)))

    def report(self, report: Report) -> None:
        report.ranks = self.ranks.times


def same_call(ranks: Ranks, pipe: Any, arguments: dict[str, Any], more: dict[str, Any]) -> None:
    """Compare versions, weights and arguments of all ranks, then give them rank 0's random state."""
    given = arguments.get("generator")
    generators: Sequence[Any] = given if isinstance(given, list | tuple) else [] if given is None else [given]
    rest = {name: value for name, value in arguments.items() if name != "generator"}
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
    ranks.first_state(generators)


def options_of(ranks: Ranks, options: Any) -> Any:
    """A call's :class:`~tiledcore.call.Options` on this rank: only rank 0 writes previews, rows and checkpoints."""
    if options.checkpoint is not None:
        options = replace(options, checkpoint=_checkpoint(ranks, options.checkpoint))
    if ranks.leads:
        return options
    # In place of what takes the rows on rank 0: this rank decodes its part, and sends it there.
    consume: Any = partial(deque, maxlen=0)
    return replace(options, preview=None, rows=None if options.rows is None else consume)


@dataclass(frozen=True)
class _Copied(Checkpoint):
    """Rank 0's checkpoint in a folder that is removed with this object."""

    kept: TemporaryDirectory[str] | None = None


def _checkpoint(ranks: Ranks, checkpoint: Checkpoint) -> Checkpoint:
    """On rank 0 the checkpoint itself, on the others a copy of what it has saved, which nobody reads again."""
    file = checkpoint.file
    saved = ranks.first(file.read_bytes() if ranks.leads and file.exists() else None)
    if ranks.leads:
        return checkpoint
    folder = TemporaryDirectory(prefix="tiledcore-")
    if saved is not None:
        (Path(folder.name) / FILE).write_bytes(saved)
    return _Copied(Path(folder.name), every=2**62, kept=folder)
