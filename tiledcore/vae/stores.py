"""Stores for bands of activations between two passes: the input tensor, the device, or pinned host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tiledcore.vae.bands import Band, Stream, split


class Given:
    """The input tensor; its bands go to the device one at a time."""

    def __init__(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.tensor, self.device, self.dtype = tensor, device, dtype

    def read(self, rows: int, consume: bool) -> Stream:
        height = self.tensor.shape[2]
        for start in range(0, height, rows):
            piece = self.tensor[:, :, start : start + rows].to(self.device, self.dtype)
            yield Band([piece.contiguous()], start + rows >= height)
            del piece


class OnDevice:
    """Bands that stay on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.bands: deque[Band] = deque()

    def append(self, band: Band) -> None:
        self.bands.append(Band(list(band.tensors), band.last))

    def read(self, rows: int, consume: bool) -> Stream:
        """Bands of at most ``rows`` rows, top to bottom; with ``consume`` each is freed after it was read."""
        if consume:
            while self.bands:
                yield from split(iter([self.bands.popleft()]), rows)
        else:
            for band in self.bands:
                yield from split(iter([Band(list(band.tensors), band.last)]), rows)


class OnHost:
    """Bands in pinned host memory, copied on another CUDA stream while the next band is computed."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.bands: deque[tuple[list[Any], bool]] = deque()
        self.writes: deque[tuple[list[Tensor], Any]] = deque()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Run on the copy stream, after all work given to the current stream so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def append(self, band: Band) -> None:
        host: list[Any] = []
        with self._beside():
            for tensor in band.tensors:
                if tensor.device.type == "meta":  # only device memory is counted
                    host.append(tensor.shape)
                    continue
                target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.stream is not None)
                host.append(target.copy_(tensor, non_blocking=True))
        self.bands.append((host, band.last))
        # A band's device memory is freed only after its copy, so at most two bands may wait.
        self.writes.append((list(band.tensors), None if self.stream is None else self.stream.record_event()))
        if len(self.writes) > 2:
            self._wait()

    def _wait(self) -> None:
        _, event = self.writes.popleft()
        if event is not None:
            event.synchronize()

    def _load(self, host: Sequence[Any]) -> tuple[list[Tensor], Any]:
        with self._beside():
            if self.device.type == "meta":
                tensors = [torch.empty(shape, dtype=self.dtype, device="meta") for shape in host]
            else:
                tensors = [t.to(self.device, non_blocking=True, copy=True) for t in host]
        return tensors, self.stream.record_event() if self.stream is not None else None

    def read(self, rows: int, consume: bool) -> Stream:
        """As :meth:`OnDevice.read`; loads the next band while one is used."""
        while self.writes:
            self._wait()
        source = (self.bands.popleft() for _ in range(len(self.bands))) if consume else iter(self.bands)
        ready: tuple[list[Tensor], Any, bool] | None = None
        for host, last in source:
            coming = (*self._load(host), last)
            if ready is not None:
                yield from self._use(*ready, rows)
            ready = coming
            del host, coming
        if ready is not None:
            yield from self._use(*ready, rows)

    def _use(self, tensors: list[Tensor], event: Any, last: bool, rows: int) -> Stream:
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(current)
        band = Band(list(tensors), last)
        tensors.clear()
        yield from split(iter([band]), rows)
