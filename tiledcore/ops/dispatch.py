"""What ops share: which implementation runs (schemas, the C++ extension, the choice), and checks of arguments.

Each implementation of an op is one torch op, ``tiledcore::NAME_IMPL``. Schemas are declared in Python, so fake tensors
and ``torch.compile`` work without a compiler and without Triton.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tiledcore import validate

Impl = Literal["reference", "native", "triton", "sdpa", "flash", "cudnn", "xformers"]
"""``reference``: plain torch, any device. ``native``: C++ from csrc/. ``triton``: kernels/. The others, for attention
only, gather tokens and call a dense attention: ``sdpa`` what torch chooses, the rest the library of that name."""

Window = Literal["mean", "gaussian", "ramp", "core"]
WINDOWS: tuple[Window, ...] = ("mean", "gaussian", "ramp", "core")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_log = logging.getLogger(__name__)
_implementations: dict[str, tuple[str, ...]] = {}


def _load_native() -> str | None:
    """Load the C++ extension; return why it is not there, or None."""
    library = Path(__file__).parent.with_name("_C.abi3.so")
    if not library.exists():
        return "the extension was not built (see csrc/ and setup.py)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        _log.warning("tiledcore runs without its C++ extension, which failed to load: %s", error)
        return f"the extension failed to load: {error}"
    return None


def define(
    name: str, schema: str, fake: Callable[..., Any], reference: Callable[..., Any], **others: Callable[..., Any]
) -> None:
    """Declare an op: one schema and one fake implementation for all of its implementations.

    ``others``: by name, those beside reference, C++ and Triton; they and ``reference`` have the schema's arguments.
    """
    implementations = {"reference": reference, "native": None, "triton": partial(_launch, name), **others}
    _implementations[name] = tuple(implementations)
    for impl, run in implementations.items():
        op = f"tiledcore::{name}_{impl}"
        torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(op, fake)
        if run is not None:  # the extension registers its own
            torch.library.impl(op, ("cpu", "cuda"))(torch.no_grad()(run))


def _launch(name: str, *arguments: Any) -> Any:
    """Run a Triton kernel by the launcher of its name. Triton is imported only here, when a kernel is needed."""
    return getattr(import_module(f"tiledcore.kernels.{name}"), name)(*arguments)


_native_missing = _load_native()


def unavailable(name: str, impl: Impl, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why an implementation of an op, such as ``"blend_tiles"``, cannot run on a device; None if it can.

    ``dtype`` is that of the op's tensors; None skips the checks that depend on it. Without a GPU (planning) a recent
    one is assumed.
    """
    attention = name == "neighbor_attention"
    if attention and impl in ("native", "triton") and dtype == torch.float64:
        return "it needs float16, bfloat16 or float32"
    if impl == "native":
        if _native_missing is not None:
            return _native_missing
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type, "")
        if not key or not torch._C._dispatch_has_kernel_for_dispatch_key(f"tiledcore::{name}_native", key):
            return f"the extension was built without {name} for {device.type}"
    if impl == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cpu":
            from tiledcore.kernels import INTERPRETED

            return None if INTERPRETED else "on the CPU it needs TRITON_INTERPRET=1 in the environment from the start"
        if device.type != "cuda":
            return f"no kernel runs on {device.type}"
        if torch.version.hip and attention:
            return "the table of configurations is for NVIDIA GPUs"
        if _old(device) and (attention or dtype == torch.bfloat16):
            what = f"{name} in {dtype}" if dtype == torch.bfloat16 else name
            major, minor = torch.cuda.get_device_capability(device)
            return f"{what} needs compute capability 8.0, and this GPU has {major}.{minor}"
    if impl in ("flash", "cudnn", "xformers"):
        if device.type != "cuda":
            return f"{impl} has no attention on {device.type}"
        if impl == "xformers" and find_spec("xformers") is None:
            return "xformers is not installed"
        if impl != "xformers" and dtype not in (None, torch.float16, torch.bfloat16):
            return f"{impl} needs float16 or bfloat16, got {dtype}"
        if _old(device):
            return f"{impl} needs compute capability 8.0"
    return None


def _old(device: torch.device) -> bool:
    """Whether a GPU is an NVIDIA GPU before Ampere. ROCm's capabilities, such as 9.4, are no NVIDIA architectures."""
    there = torch.cuda.is_available() and not torch.version.hip
    return there and torch.cuda.get_device_capability(device)[0] < 8


def choose(name: str, impl: Impl | None, device: torch.device, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """The op to call: the named implementation, or the fastest one available.

    Raises:
        ValueError: the op has no implementation of that name.
        RuntimeError: the named implementation is unavailable; no other takes its place.
    """
    known = _implementations[name]
    if impl is None:
        # Interpreted Triton is for tests: on the CPU it must be named.
        ranking: tuple[Impl, ...] = ("triton", "native", "sdpa") if device.type == "cuda" else ("native", "sdpa")
        there = (i for i in ranking if i in known and unavailable(name, i, device, dtype) is None)
        impl = next(there, "reference")
    elif impl not in known:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(known)}, or None")
    elif (reason := unavailable(name, impl, device, dtype)) is not None:
        raise RuntimeError(f"{name}: impl={impl!r} is unavailable on {device}: {reason}")
    return getattr(torch.ops.tiledcore, f"{name}_{impl}")


def check_tensor(
    name: str,
    tensor: Any,
    dims: str,
    dtypes: Sequence[torch.dtype] = (),
    shape: tuple[int, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    """A tensor of these dimensions, such as ``"[B, C, H, W]"``.

    ``dtypes``: what it may have; default: any floating-point dtype. ``shape``: what it must have. ``like``: a tensor
    whose device it must be on.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(tensor).__name__}")
    if not dtypes and not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if dtypes and tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be of dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.dim() != dims.count(",") + 1 or (shape is not None and tensor.shape != shape):
        wanted = dims if shape is None else f"{dims} = {shape}"
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, not on {like.device}")


def check_size(name: str, size: Sequence[int], least: int = 1) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2 or any(n < least for n in size):
        raise ValueError(f"{name}={size!r} must be a (y, x) pair of at least {least}")
    return size[0], size[1]


def check_offsets(
    offsets: Tensor, like: Tensor, canvas_size: tuple[int, int], tile: tuple[int, int], blended: bool = False
) -> None:
    """Corners of tiles that lie on the canvas. ``blended``: they are rows times columns, and cover the canvas."""
    check_tensor("offsets", offsets, "[T, 2]", (torch.int32,), like=like)
    if len(offsets) == 0 or offsets.shape[1] != 2:
        raise ValueError(f"offsets must be [T, 2] with T >= 1, got {tuple(offsets.shape)}")
    if tile[0] > canvas_size[0] or tile[1] > canvas_size[1]:
        raise ValueError(f"tile {tile} is larger than the canvas {canvas_size}")
    if readable(offsets):
        _check_places(tuple(map(tuple, offsets.tolist())), canvas_size, tile, blended)


def readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at: at once (on the CPU), and at all (not fake, not traced)."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


# A sampler calls with the same few offsets hundreds of times: looked at once, and known from then on.
@lru_cache(maxsize=128)
def _check_places(pairs: tuple[Any, ...], canvas_size: tuple[int, int], tile: tuple[int, int], blended: bool) -> None:
    for t, (y, x) in enumerate(pairs):
        if not (0 <= y < canvas_size[0] and 0 <= x < canvas_size[1]):
            raise ValueError(f"offsets[{t}]={(y, x)} is not on the canvas {canvas_size}")
    if not blended:
        return
    starts = [sorted(set(axis)) for axis in zip(*pairs, strict=True)]
    if sorted(pairs) != list(product(*starts)):
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


def check_window(window: Window, ramp: int) -> tuple[Window, int]:
    """The window and its ramp as the kernels know them: ``"core"`` is a ramp of one pixel."""
    validate.choice("window", window, WINDOWS)
    validate.integer("ramp", ramp, 1)
    return ("ramp", 1) if window == "core" else (window, ramp)
