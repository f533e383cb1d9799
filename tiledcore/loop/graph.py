"""The step as a CUDA graph: captured once, and replayed if measured to be faster.

A graph replays the same kernels on the same addresses. So a step's inputs and outputs stay in buffers, which are kept
with their graph under one key; the least recently used pair is dropped first.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch.utils._pytree import tree_flatten, tree_leaves

from tiledcore.utils import using

logger = logging.getLogger(__name__)

Mode = Literal["auto"] | bool
Body = Callable[[], None]

GAIN = 0.03  # A graph is kept if it saves more than this share of the eager step's time: below, it only costs memory
KEYS = 4  # So many pairs of buffers and graph are kept
RESERVE = 1 << 28  # Bytes of device memory that must stay free after a capture; otherwise the graph is dropped


class CudaBackend:
    """Captures and times steps. Graphs that live at one time share a memory pool: no two of them run at once."""

    broken: str | None = None  # Why a capture failed: the device may be in any state, so none is tried again

    def __init__(self) -> None:
        self._live: WeakSet[Any] = WeakSet()

    def capture(self, body: Body) -> Body:
        """Record a step without running it; the result replays it."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # A pool whose graphs are all gone cannot be used again.
        pool = next((other.pool() for other in self._live), None)
        try:
            with torch.cuda.graph(graph, pool=pool):
                body()
        except BaseException as error:
            CudaBackend.broken = not_captured(error)
            # torch leaves its side stream current where the end of a capture raises.
            torch.cuda.set_stream(stream)
            graph.reset()
            raise
        self._live.add(graph)
        replay: Body = graph.replay
        return replay

    def seconds(self, body: Body) -> float:
        """Run a step and time it on the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        body()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]


def not_captured(error: BaseException) -> str:
    return f"the step cannot be captured: {str(error).partition(chr(10))[0]}"


@dataclass
class Counters:
    """What happened to the steps of a run."""

    eager: int = 0
    captures: int = 0
    replays: int = 0
    reason: str | None = None  # Why there is no graph, or no longer one


@dataclass
class Entry:
    """Buffers, and the graph of the step that works on them."""

    buffers: Any
    replay: Body | None = None
    keeps: Any = None  # What the graph's kernels read beside the buffers: it must live as long as the graph
    refused: str | None = None
    eager_seconds: list[float] = field(default_factory=list)  # Of each step that was timed without a graph
    replays: int = 0  # The second is timed


@dataclass
class StepGraphs:
    """Runs steps, as graphs where they pay.

    Args:
        mode: ``"auto"``: the second step of a key is timed, the third captured, the fourth timed; the graph stays if it
            gains more than :data:`GAIN`. True: captured after one step and kept; a failure raises. False: never.
        backend: a :class:`CudaBackend`, or a test's double; None: no device here can capture.
    """

    mode: Mode = "auto"
    backend: Any = None
    counters: Counters = field(default_factory=Counters)
    _entries: dict[Hashable, Entry] = field(default_factory=dict)  # The last one was used last

    def __post_init__(self) -> None:
        if self.mode not in ("auto", True, False):
            raise ValueError(f"cuda_graph={self.mode!r}: must be 'auto', True or False")

    def entry(self, key: Hashable, make: Callable[[], Any]) -> Entry:
        """The buffers and the graph of a key: all that kernels depend on, such as shapes, dtypes and numbers."""
        self._entries[key] = entry = self._entries.pop(key, None) or Entry(make())
        if len(self._entries) > KEYS:
            del self._entries[next(iter(self._entries))]
        return entry

    def release(self) -> None:
        """Drop all graphs with their memory. A step that was kept is captured again when it comes back."""
        for entry in self._entries.values():
            entry.replay = entry.keeps = None
            entry.replays = entry.replays if entry.replays >= 2 else 0

    def run(self, entry: Entry, body: Body, refused: str | None = None, keeps: Any = None) -> None:
        """Run one step, eagerly or as a graph. ``body`` touches only the entry's buffers and what is in ``keeps``;
        ``refused``: why it must be eager.

        Raises:
            RuntimeError: ``mode`` is True, and the step was refused or could not be captured.
        """
        broken = "there is no CUDA device" if self.backend is None else self.backend.broken
        refused = refused or ("cuda_graph=False" if self.mode is False else broken)
        if refused is not None and self.mode is True:
            raise RuntimeError(f"cuda_graph=True: {refused}")
        # The first step allocates, compiles and loads; only the second is worth timing.
        warm = len(entry.eager_seconds) >= (1 if self.mode is True else 2)
        if not (refused or entry.refused) and entry.replay is None and warm:
            self._capture(entry, body, keeps)
        refused = refused or entry.refused
        if refused is None and entry.replay is not None:
            self._replay(entry, entry.replay)
            return
        self.counters.eager += 1
        if refused is None:
            entry.eager_seconds.append(self.backend.seconds(body))
        else:
            self.counters.reason = refused
            body()

    def _capture(self, entry: Entry, body: Body, keeps: Any) -> None:
        """Capture the step. If it fails, the caller runs it: here, the traceback would hold the attempt's tensors."""
        try:
            with using() as used:
                replay = self.backend.capture(body)
        except RuntimeError as error:
            reason = not_captured(error)
            if self.mode is True:
                raise RuntimeError(f"cuda_graph=True: {reason}") from error
            self._drop(entry, reason)
            return
        self.counters.captures += 1
        if self.mode == "auto" and self.backend.free_bytes() < RESERVE:
            self._drop(entry, "the graph's memory does not fit beside the rest")
        else:
            entry.replay, entry.keeps = replay, (body, keeps, used)

    def _replay(self, entry: Entry, replay: Body) -> None:
        self.counters.replays += 1
        entry.replays += 1
        if entry.replays != 2 or self.mode is True:
            replay()
        elif (gain := 1 - self.backend.seconds(replay) / entry.eager_seconds[-1]) <= GAIN:
            self._drop(entry, f"replay gains {gain:.1%}, and a graph is kept above {GAIN:.0%}")

    def _drop(self, entry: Entry, reason: str) -> None:
        entry.replay, entry.keeps, entry.refused = None, None, reason
        self.counters.reason = reason
        logger.info("no CUDA graph: %s", reason)


def identity(network: Any) -> tuple[Any, ...]:
    """What a graph of the network bakes in: where its weights lie, and the code and plain settings of all its modules.

    Such as an adapter's scale, whether it is merged, FreeU's factors, and the attention processors with theirs.
    """
    weights = hash(tuple(t.data_ptr() for t in (*network.parameters(), *network.buffers())))
    settings = []
    for module in network.modules():
        code = getattr(module.forward, "__func__", module.forward)  # some libraries replace it
        settings.append((id(module), id(code), module.training, *_plain(vars(module))))
        processor = getattr(module, "processor", None)
        if processor is not None:
            settings.append((type(processor).__name__, *_plain(vars(processor))))
    return id(network), weights, hash(tuple(settings))


def _plain(attributes: dict[str, Any]) -> Iterator[str]:
    """Names and values of the attributes that hold nothing but plain values."""
    for name, value in attributes.items():
        if all(isinstance(leaf, bool | int | float | str | None) for leaf in tree_leaves(value)):
            yield f"{name}={value}"


def refill(old: Any, new: Any) -> bool:
    """Copy new values into the tensors of a structure; False where it differs in anything else."""
    (before, form), (after, new_form) = tree_flatten(old), tree_flatten(new)
    return form == new_form and all(map(_refill, before, after))


def _refill(old: Any, new: Any) -> bool:
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return type(old) is type(new) and bool(old == new)
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return False
    old.copy_(new)
    return True
