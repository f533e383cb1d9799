"""The windows of each layer in canvas mode, and rotary positions on a large canvas.

With rotary positions (RoFormer, Su et al. 2021) a score depends on the distance of query and key. Between image tokens
of a window, distances on the canvas are used as they are. Text tokens stand at one place, so that their distance from
an image token would grow with the canvas. For them, positions are scaled down linearly to a picture of the native size:
every distance is one of training. So image queries and keys are rotated twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiledcore import ops
from tiledcore.geometry import Pair

Box = tuple[slice, slice]
"""Rows and columns of a canvas, with their ends."""


class QKV(NamedTuple):
    """Queries, keys and values, ``[B, tokens, heads, D]`` each."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Windows:
    """One layer's canvas, in its own tokens; pairs are (y, x)."""

    canvas: Pair
    tile: Pair
    halo: Pair
    wrap: tuple[bool, bool]
    native: Pair  # Size of the picture that positions are taken from

    @property
    def shrink(self) -> float:
        """Factor, at most 1, that scales positions on the canvas to those in a picture of the native size."""
        return min(1.0, *((m - 1) / (n - 1) for m, n in zip(self.native, self.canvas, strict=True) if n > 1), 1.0)

    def unrolled(self) -> tuple["Windows", tuple[range, range]]:
        """This canvas with its wrapped axes cut open and continued by what their windows reach.

        A rotation knows no wrap: neighbours across the border would be the canvas' width apart. The halo is cut to what
        no position can reach from both sides. Also returns where rows and columns lie on this canvas, modulo its size.
        """
        axes = zip(self.canvas, self.tile, self.halo, self.wrap, strict=True)
        (rows, hy), (columns, hx) = (_unroll(*axis) for axis in axes)
        return Windows((len(rows), len(columns)), self.tile, (hy, hx), (False, False), self.native), (rows, columns)

    def around(self, part: Box) -> Box:
        """What the windows of some rows and columns need: from a whole tile on, and all of an axis that wraps."""
        axes = zip(part, self.canvas, self.tile, self.halo, self.wrap, strict=True)
        rows, columns = (
            slice(0, size)
            if wrap
            else slice(max(0, s.start // tile - -(-halo // tile)) * tile, min(-(-s.stop // tile) * tile + halo, size))
            for s, size, tile, halo, wrap in axes
        )
        return rows, columns


def _unroll(size: int, tile: int, halo: int, wrap: bool) -> tuple[range, int]:
    """The positions of one axis, continued on both sides if it wraps, and the halo."""
    reach = min(halo, (size - tile) // 2)
    if not wrap or reach <= 0:  # one tile is the whole axis, or no tile leaves its own
        return range(size), halo
    front = -(-reach // tile) * tile  # whole tiles, so that the partition stays where it is
    last = (size - 1) // tile * tile
    return range(-front, last + tile + reach), reach


@dataclass(frozen=True, eq=False)
class Prompt:
    """One of several prompts of a canvas, whose texts come one after the other."""

    tokens: int  # Of its text
    share: Tensor  # ``[H, W]`` float32 on the CPU: its share in each canvas pixel, not 0 everywhere


@dataclass
class Canvas:
    """What all layers share: the settings, and the canvas of the evaluation that is running."""

    impl: ops.Impl | None
    windows: dict[int, Windows] = field(default_factory=dict)  # Per level, by the number of its tokens
    text_kept: list[list[Tensor]] | None = None
    """Per prompt and image, the indices of the text tokens that count, where not all do."""
    prompts: Sequence[Prompt] = ()  # Where parts of the canvas have their own
    tables: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """Rotations and shares of this canvas' tokens, for all layers and steps."""

    def enter(self, windows: list[Windows]) -> None:
        """Start an evaluation on these levels, the finest first."""
        levels = {w.canvas[0] * w.canvas[1]: w for w in windows}
        if levels != self.windows:
            self.windows = levels
            self.tables = {}
        self.text_kept = None

    def level(self, tokens: int) -> Windows:
        """The level with so many tokens; each has fewer than the one above it."""
        if tokens not in self.windows:
            sizes = ", ".join("{}x{}".format(*w.canvas) for w in self.windows.values())
            raise ValueError(
                f"hidden_states has {tokens} image tokens, but the levels of this canvas are {sizes or 'not known yet'}"
            )
        return self.windows[tokens]

    def image(self) -> Windows:
        """The only level of a transformer."""
        if len(self.windows) != 1:
            raise RuntimeError("the layer was called outside of its network's forward, so that its canvas is unknown")
        return next(iter(self.windows.values()))

    def texts(self, text: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """The part of each prompt in a tensor of all text tokens along ``dim``."""
        return text.split([prompt.tokens for prompt in self.prompts] or text.shape[dim], dim)

    def share(self, prompt: Prompt, size: Pair, device: torch.device) -> tuple[Tensor, Tensor, Box]:
        """Of a prompt at a level of ``size``: the tokens with a share, the shares ``[h, w]``, the box around them."""

        def make() -> tuple[Tensor, Tensor, Box]:
            share = F.interpolate(prompt.share[None, None], size, mode="area")[0, 0]
            at = share.nonzero()
            (top, left), (bottom, right) = at.amin(0).tolist(), (at.amax(0) + 1).tolist()
            box = (slice(top, bottom), slice(left, right))
            return (at[:, 0] * size[1] + at[:, 1]).to(device), share.to(device), box

        return self.table((prompt, size, device), make)

    def table(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self.tables:
            self.tables[key] = make()
        return self.tables[key]


@dataclass(frozen=True)
class Rotary:
    """Rotary positions over (frame, y, x): pair i of an axis' d channels turns by ``position * theta**(-2i/d)``."""

    axes: tuple[int, int, int]  # Channels of each head that belong to frame, y and x
    theta: float
    centred: bool = False  # Whether the middle of the image has position 0, rather than its first token

    def turns(self, axis: int, positions: Tensor) -> Tensor:
        """``[n, d/2]`` complex64 for ``n`` positions; float64 inside, since phases grow with the canvas."""
        d = self.axes[axis]
        speed = self.theta ** (-torch.arange(0, d, 2, dtype=torch.float64, device=positions.device) / d)
        phase = torch.outer(positions.double(), speed)
        return torch.polar(torch.ones_like(phase), phase).to(torch.complex64)

    def grid(self, ys: Tensor, xs: Tensor) -> Tensor:
        """``[len(ys) * len(xs), D/2]`` of image tokens. The frame does not turn them; the text's is relative to it."""
        rows, columns = self.turns(1, ys)[:, None], self.turns(2, xs)[None]
        still = rows.new_ones(1, 1, self.axes[0] // 2)
        return torch.cat([t.expand(len(ys), len(xs), -1) for t in (still, rows, columns)], -1).flatten(0, 1)

    def origin(self, windows: Windows) -> tuple[Pair, Pair]:
        """Size of the canvas as a picture of the native size, and the position of its first token."""
        size = [round((n - 1) * windows.shrink) + 1 for n in windows.canvas]
        first = [n // 2 - n if self.centred else 0 for n in size]
        return (size[0], size[1]), (first[0], first[1])

    def picture(self, windows: Windows, ys: Tensor, xs: Tensor) -> Tensor:
        """As :meth:`grid`, of canvas positions scaled to the native size."""
        _, (top, left) = self.origin(windows)
        return self.grid(top + ys * windows.shrink, left + xs * windows.shrink)

    def text(self, windows: Windows, counts: Sequence[int], device: torch.device) -> Tensor:
        """``[sum(counts), D/2]`` of texts that each stand on the diagonal behind the picture (Qwen-Image)."""
        size, _ = self.origin(windows)
        positions = torch.cat([torch.arange(n, device=device) for n in counts]) + max(n // 2 for n in size)
        return torch.cat([self.turns(axis, positions) for axis in range(3)], -1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn channel pairs (2i, 2i + 1) of ``[B, N, heads, D]`` by ``[N, D/2]`` or ``[B, N, D/2]`` complex."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2).type_as(x)


class Placed(NamedTuple):
    """Image tokens where their layer's windows are."""

    windows: Windows
    near: QKV  # Rotated by their positions on the canvas; unrolled where that wraps
    far_q: Tensor | None  # Rotated and unrolled queries for the global keys; None where those of ``near`` are the same
    far_k: Tensor  # Keys for the text's queries, ``[B, N, heads, D]``
    inside: Box  # The canvas itself on ``windows.canvas``


def place(canvas: Canvas, image: QKV, rotary: Rotary | None) -> Placed:
    """Rotate image tokens, if their network does, for each kind of key that they meet."""
    windows = canvas.level(image.k.shape[1])
    h, w = windows.canvas
    if rotary is None:
        return Placed(windows, image, None, image.k, (slice(0, h), slice(0, w)))
    device = image.q.device
    rows, columns = (torch.arange(n, device=device) for n in windows.canvas)
    picture = canvas.table((device, "picture"), lambda: rotary.picture(windows, rows, columns))
    far_q, far_k = rotate(image.q, picture), rotate(image.k, picture)
    flat, ranges = windows.unrolled()
    inside = (slice(-ranges[0].start, h - ranges[0].start), slice(-ranges[1].start, w - ranges[1].start))
    rolled = flat.canvas != windows.canvas
    if not rolled and windows.shrink == 1:
        return Placed(flat, QKV(far_q, far_k, image.v), None, far_k, inside)
    rows, columns = (torch.arange(r.start, r.stop, device=device) for r in ranges)
    spread = canvas.table((device, "canvas"), lambda: rotary.grid(rows, columns))
    if rolled:
        at = canvas.table((device, "unrolled"), lambda: (rows[:, None] % h * w + columns % w).flatten())
        image = QKV(*(t.index_select(1, at) for t in image))
        far_q = far_q.index_select(1, at)
    near = QKV(rotate(image.q, spread), rotate(image.k, spread), image.v)
    return Placed(flat, near, far_q, far_k, inside)
