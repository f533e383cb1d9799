"""The public ops: argument checks, schemas, fake implementations, and the choice of implementation.

Every op exists as ``tiledcore::NAME_reference`` (plain torch, any device), ``tiledcore::NAME_native``
(C++ from csrc/, where it was built) and ``tiledcore::NAME_triton`` (kernels/). The schemas live here,
so that fake tensors, ``torch.compile`` and tests work without a compiler and without Triton; C++ only
adds implementations. The ops are for inference: no implementation has a gradient.
"""

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tiledcore import reference

Impl = Literal["reference", "native", "triton"]
Window = Literal["mean", "gaussian", "ramp", "core"]
WINDOWS: tuple[Window, ...] = ("mean", "gaussian", "ramp", "core")

_BLEND_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_log = logging.getLogger(__name__)


def _load_native() -> str | None:
    """Load the C++ extension; return why it is not there, or None."""
    library = Path(__file__).with_name("_C.abi3.so")
    if not library.exists():
        return "the extension was not built (see csrc/ and setup.py)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        _log.warning("tiledcore runs without its C++ extension, which failed to load: %s", error)
        return f"the extension failed to load: {error}"
    return None


# ----------------------------------------------------------------------------- schemas

_GATHER = "(Tensor canvas, Tensor offsets, SymInt tile_h, SymInt tile_w) -> Tensor"
_BLEND = "(Tensor tiles, Tensor offsets, SymInt height, SymInt width, str window, int ramp) -> Tensor"


def _fake_gather(canvas: Tensor, offsets: Tensor, tile_h: int, tile_w: int) -> Tensor:
    B, C = canvas.shape[:2]
    return canvas.new_empty((offsets.shape[0] * B, C, tile_h, tile_w))


def _fake_blend(tiles: Tensor, offsets: Tensor, height: int, width: int, window: str, ramp: int) -> Tensor:
    return tiles.new_empty((tiles.shape[0] // offsets.shape[0], tiles.shape[1], height, width))


for _impl in ("reference", "native", "triton"):
    for _name, _schema, _fake in (
        ("gather_tiles", _GATHER, _fake_gather),
        ("blend_tiles", _BLEND, _fake_blend),
    ):
        _op = f"tiledcore::{_name}_{_impl}"
        torch.library.define(_op, _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(_op, _fake)


@torch.library.impl("tiledcore::gather_tiles_reference", ("cpu", "cuda"))
def _gather_reference(canvas: Tensor, offsets: Tensor, tile_h: int, tile_w: int) -> Tensor:
    return reference.gather_tiles(canvas, offsets, (tile_h, tile_w))


@torch.library.impl("tiledcore::blend_tiles_reference", ("cpu", "cuda"))
def _blend_reference(tiles: Tensor, offsets: Tensor, height: int, width: int, window: str, ramp: int) -> Tensor:
    return reference.blend_tiles(tiles, offsets, (height, width), window, ramp)


@torch.library.impl("tiledcore::gather_tiles_triton", ("cpu", "cuda"))
def _gather_triton(canvas: Tensor, offsets: Tensor, tile_h: int, tile_w: int) -> Tensor:
    from tiledcore.kernels.gather_tiles import gather_tiles as kernel

    return kernel(canvas, offsets, (tile_h, tile_w))


@torch.library.impl("tiledcore::blend_tiles_triton", ("cpu", "cuda"))
def _blend_triton(tiles: Tensor, offsets: Tensor, height: int, width: int, window: str, ramp: int) -> Tensor:
    from tiledcore.kernels.blend_tiles import blend_tiles as kernel

    return kernel(tiles, offsets, (height, width), window, ramp)


_native_missing = _load_native()


# ----------------------------------------------------------------------------- dispatch


def unavailable(name: str, impl: Impl, device: torch.device) -> str | None:
    """Why an implementation of an op cannot run on a device, or None where it can.

    Args:
        name: the op, such as ``"blend_tiles"``.
        impl: ``"reference"``, ``"native"`` or ``"triton"``.
        device: where the op's tensors are.
    """
    if impl == "native":
        if _native_missing is not None:
            return _native_missing
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type, "")
        op = f"tiledcore::{name}_native"
        if not key or not torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
            return f"the extension was built without {name} for {device.type}"
    elif impl == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cpu":
            from tiledcore.kernels import INTERPRETED

            if not INTERPRETED:
                return "on the CPU it needs TRITON_INTERPRET=1 in the environment from the start"
        elif device.type != "cuda":
            return f"no kernel runs on {device.type}"
    return None


def _choose(name: str, impl: Impl | None, device: torch.device) -> Callable[..., Tensor]:
    """The op to call. What was asked for by name is used or refused, never replaced."""
    if impl is None:
        # Interpreted Triton is for tests: on the CPU only an explicit wish selects it.
        ranking: tuple[Impl, ...] = ("triton", "native") if device.type == "cuda" else ("native",)
        impl = next((i for i in ranking if unavailable(name, i, device) is None), "reference")
    elif impl not in ("reference", "native", "triton"):
        raise ValueError(f"impl={impl!r} is not one of reference, native, triton, or None")
    elif (reason := unavailable(name, impl, device)) is not None:
        raise RuntimeError(f"{name}: impl={impl!r} is unavailable on {device}: {reason}")
    return getattr(torch.ops.tiledcore, f"{name}_{impl}")


# ----------------------------------------------------------------------------- checks


def _check_image(name: str, tensor: Tensor, dims: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have the shape {dims}, got {tuple(tensor.shape)}")


def _check_size(name: str, size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or any(n < 1 for n in size):
        raise ValueError(f"{name}={tuple(size)} must be a height and a width of at least 1")
    return size[0], size[1]


def _check_offsets(offsets: Tensor, like: Tensor, canvas_size: tuple[int, int], tile: tuple[int, int]) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be an int32 tensor [T, 2], got {type(offsets).__name__}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be of dtype torch.int32, got {offsets.dtype}")
    if offsets.dim() != 2 or offsets.shape[1] != 2 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must be [T, 2] with T >= 1, got {tuple(offsets.shape)}")
    if offsets.device != like.device:
        raise ValueError(f"offsets are on {offsets.device}, but the image is on {like.device}")
    if tile[0] > canvas_size[0] or tile[1] > canvas_size[1]:
        raise ValueError(f"tile {tile} is larger than the canvas {canvas_size}")
    if not _readable(offsets):
        return
    for t, (y, x) in enumerate(offsets.tolist()):
        if not (0 <= y < canvas_size[0] and 0 <= x < canvas_size[1]):
            raise ValueError(f"offsets[{t}]={(y, x)} is not on the canvas {canvas_size}")


def _readable(offsets: Tensor) -> bool:
    """Whether the values can be looked at: at once (on the CPU), and at all (not fake, not traced)."""
    return offsets.device.type == "cpu" and type(offsets) is Tensor and not torch.compiler.is_compiling()


def _check_grid(offsets: Tensor, canvas_size: tuple[int, int], tile: tuple[int, int]) -> None:
    """The offsets are every pair of some rows and some columns, and the tiles cover the canvas."""
    pairs = [(y, x) for y, x in offsets.tolist()]
    starts = [sorted(set(axis)) for axis in zip(*pairs, strict=True)]
    if len(set(pairs)) != len(pairs) or len(pairs) != len(starts[0]) * len(starts[1]):
        raise ValueError(
            f"offsets must be each of the {len(starts[0])} rows with each of the "
            f"{len(starts[1])} columns exactly once, got {len(pairs)} offsets"
        )
    for axis, start, extent, size in zip("yx", starts, tile, canvas_size, strict=True):
        for here, after in zip(start, [*start[1:], start[0] + size], strict=True):
            if here + extent < after:
                raise ValueError(
                    f"offsets leave {axis} = {(here + extent) % size} to {(after - 1) % size} of "
                    f"the canvas {canvas_size} without a tile"
                )


# ----------------------------------------------------------------------------- the ops


def gather_tiles(canvas: Tensor, offsets: Tensor, tile: tuple[int, int], *, impl: Impl | None = None) -> Tensor:
    """Cut tiles out of a canvas, tile-major.

    The canvas is a torus: element ``(t*B + b, c, u, v)`` of the result is
    ``canvas[b, c, (y_t + u) % H, (x_t + v) % W]``. On a canvas that does not wrap the offsets are
    such that no tile crosses the border. Every implementation copies bit for bit.

    Args:
        canvas: ``[B, C, H, W]``, any floating-point dtype. Copied if it is not contiguous.
        offsets: ``[T, 2]`` int32, the (y, x) of each tile's first pixel in canvas pixels, with
            ``0 <= y < H`` and ``0 <= x < W``, on the canvas's device. Checked on the CPU; on CUDA it
            is a precondition, for to look would wait for the device.
        tile: height and width ``(h, w)`` in canvas pixels, at most ``(H, W)``.
        impl: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest there is.

    Returns:
        ``[T*B, C, h, w]``, contiguous, without a gradient.

    Raises:
        TypeError: ``canvas`` or ``offsets`` is not a tensor of such a dtype.
        ValueError: a shape, size, device, offset or ``impl`` is not as above.
        RuntimeError: ``impl`` was named and is unavailable here.
    """
    _check_image("canvas", canvas, "[B, C, H, W]")
    tile = _check_size("tile", tile)
    _check_offsets(offsets, canvas, (canvas.shape[2], canvas.shape[3]), tile)
    return _choose("gather_tiles", impl, canvas.device)(canvas, offsets, tile[0], tile[1])


def blend_tiles(
    tiles: Tensor,
    offsets: Tensor,
    canvas_size: tuple[int, int],
    *,
    window: Window = "ramp",
    ramp: int = 8,
    impl: Impl | None = None,
) -> Tensor:
    """Blend overlapping tiles into a canvas: at each pixel a weighted mean of the tiles over it.

    The inverse of :func:`gather_tiles`: tiles that agree give back the canvas that they were cut
    from, to rounding, and bit for bit where one tile alone has weight. The weights are separable,
    ``w = w_y * w_x``, computed from coordinates, and normalised by their sum. Per axis:

    - ``"mean"``: 1 (MultiDiffusion, Bar-Tal et al. 2023).
    - ``"gaussian"``: ``exp(-((u + 0.5)/h - 0.5)**2 / 0.02)`` at pixel ``u`` of a tile of ``h``
      (Mixture of Diffusers, Jiménez 2023).
    - ``"ramp"``: ``clamp(1 - (d_max - d)/ramp, 0, 1)``, where ``d`` is the depth of the pixel's
      centre in the tile (its distance from the tile's border) and ``d_max`` the depth in the deepest
      tile over the pixel. A tile fades over ``ramp`` pixels centred on the border of its core.
    - ``"core"``: the ramp of one pixel, so each tile is cropped to its core; a tie is averaged.

    A pixel of a tile whose weight is 0 is not read, so nothing in it can spread. Sums are in float32
    (float64 for float64) and in the order of the corners (y, x): the order in which tiles are listed
    does not change a bit of the result, and neither does anything else from one call to the next.

    Args:
        tiles: ``[T*B, C, h, w]``, float16, bfloat16, float32 or float64, tile-major as from
            :func:`gather_tiles`. Copied if they are not contiguous.
        offsets: ``[T, 2]`` int32, the (y, x) of each tile's first pixel, in canvas pixels, on the
            tiles' device: each of some rows with each of some columns once, in any order, covering
            the canvas (a torus). Checked on the CPU; on CUDA it is a precondition, for to look would
            wait for the device, and a pixel without a tile becomes NaN.
        canvas_size: height and width ``(H, W)`` in pixels, at least the tile's.
        window: which weights.
        ramp: canvas pixels over which a tile fades, at least 1; used by ``"ramp"``.
        impl: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest there is.

    Returns:
        ``[B, C, H, W]`` of the tiles' dtype, contiguous, without a gradient.

    Raises:
        TypeError: ``tiles``, ``offsets`` or ``ramp`` is not of such a type.
        ValueError: a shape, size, device, offset, window, ramp or ``impl`` is not as above.
        RuntimeError: ``impl`` was named and is unavailable here.
    """
    _check_image("tiles", tiles, "[T*B, C, h, w]")
    if tiles.dtype not in _BLEND_DTYPES:
        raise TypeError(f"tiles must be of one of {_BLEND_DTYPES}, got {tiles.dtype}")
    size = _check_size("canvas_size", canvas_size)
    tile = _check_size("the tile's size", tiles.shape[2:])
    _check_offsets(offsets, tiles, size, tile)
    if tiles.shape[0] % offsets.shape[0]:
        raise ValueError(f"tiles has {tiles.shape[0]} entries, no multiple of the {offsets.shape[0]} offsets")
    if _readable(offsets):
        _check_grid(offsets, size, tile)
    if window not in WINDOWS:
        raise ValueError(f"window={window!r} is not one of {', '.join(WINDOWS)}")
    if isinstance(ramp, bool) or not isinstance(ramp, int):
        raise TypeError(f"ramp must be an int, got {ramp!r}")
    if ramp < 1:
        raise ValueError(f"ramp={ramp} must be at least 1")
    window, ramp = ("ramp", 1) if window == "core" else (window, ramp)
    op = _choose("blend_tiles", impl, tiles.device)
    return op(tiles, offsets, size[0], size[1], window, ramp)
