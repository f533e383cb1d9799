"""Sharing: what a call of a pipeline does differently where several processes make the same call."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from tqdm import tqdm

from tiledcore.feature import Feature
from tiledcore.hook import NetworkHook
from tiledcore.loop.checkpoint import FILE, Checkpoint, settings_of
from tiledcore.loop.report import Report
from tiledcore.parallel.ranks import Ranks, Times
from tiledcore.utils import replaced


class Sharing(Feature):
    """The tile batches of one call are dealt to the ranks; only rank 0 shows progress."""

    def __init__(self, ranks: Ranks, pipe: Any, hook: NetworkHook) -> None:
        self.ranks, self.pipe, self.hook = ranks, pipe, hook

    def enter(self, stack: ExitStack) -> None:
        self.ranks.times = Times([0.0] * self.ranks.size)
        self.hook.denoiser.deal = self.ranks.deal
        if not self.ranks.leads:
            stack.enter_context(replaced(self.pipe, progress_bar=_no_bar))

    def report(self, report: Report) -> None:
        report.ranks = self.ranks.times


def _unused(bands: Iterator[Any]) -> None:
    """In place of what takes the rows on rank 0: this rank decodes its part, and sends it there."""
    deque(bands, maxlen=0)


def _no_bar(iterable: Any = None, total: int | None = None) -> Any:
    return tqdm(iterable, total=total, disable=True)


def same_call(ranks: Ranks, pipe: Any, arguments: dict[str, Any], more: dict[str, Any]) -> None:
    """Compare versions, weights and arguments of all ranks, then give them rank 0's random state.

    Raises:
        ValueError: they differ; names what and where.
    """
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
    return replace(options, preview=None, rows=None if options.rows is None else _unused)


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
