"""neighbor_attention: attention of each tile of a canvas to itself and a halo around it."""

import math
from typing import Any

import torch
from torch import Tensor

from tiledcore.ops import reference
from tiledcore.ops.checks import BLEND_DTYPES
from tiledcore.ops.dispatch import Impl, choose, define, unavailable
from tiledcore.ops.gathered_attention import GATHERED

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? global_q, Tensor? global_k, Tensor? global_v, SymInt[2] canvas, "
    "int[2] tile, int[2] halo, bool[2] wrap, float scale) -> Tensor"
)
TRITON_HEAD_DIM = 160  # the widest head that the Triton kernel takes

FASTEST: dict[tuple[int, int], dict[int, Impl]] = {}
"""(compute capability such as 90, D) -> from how many queries a tile -> the fastest. ``python -m bench tune`` measures
it on a card and writes the line above. Empty: nothing has been measured yet, and Triton is the default."""

Pair = tuple[int, int]


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


IMPLS: tuple[Impl, ...] = ("reference", "native", "triton", "sdpa", "flash", "cudnn", "xformers")
define("neighbor_attention", _SCHEMA, _fake, IMPLS)
for _name, _gathered in GATHERED.items():
    torch.library.impl(f"tiledcore::neighbor_attention_{_name}", ("cpu", "cuda"))(_gathered)


@torch.library.impl("tiledcore::neighbor_attention_reference", ("cpu", "cuda"))
@torch.no_grad()
def _reference(*arguments: Any) -> Tensor:
    tensors, geometry = arguments[:6], arguments[6:]
    return reference.neighbor_attention(*tensors[:3], *geometry, *tensors[3:])


def _check_tokens(name: str, tensor: Tensor, like: Tensor | None = None, tokens: int | None = None) -> None:
    """A tensor ``[B, tokens, heads, D]``; of q's dtype, device, batch, heads and D, where ``like`` is q."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [B, tokens, heads, D], got {type(tensor).__name__}")
    if tensor.dtype not in BLEND_DTYPES:
        raise TypeError(f"{name} must be of one of {BLEND_DTYPES}, got {tensor.dtype}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have the shape [B, tokens, heads, D], got {tuple(tensor.shape)}")
    if like is None:
        return
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must be of q's dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but q is on {like.device}")
    B, _, heads, D = like.shape
    N = tensor.shape[1] if tokens is None else tokens
    if tensor.shape != (B, N, heads, D):
        count = "any" if tokens is None else N
        raise ValueError(f"{name} must be [B={B}, tokens={count}, heads={heads}, D={D}], got {tuple(tensor.shape)}")


def _check_pair(name: str, value: Pair, least: int) -> Pair:
    if (
        not isinstance(value, tuple | list)
        or len(value) != 2
        or any(isinstance(n, bool) or not isinstance(n, int | torch.SymInt) or n < least for n in value)
    ):
        raise ValueError(f"{name}={value!r} must be a (y, x) pair of ints of at least {least}")
    return value[0], value[1]


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    canvas: tuple[int, int],
    tile: tuple[int, int],
    halo: tuple[int, int],
    wrap: tuple[bool, bool] = (False, False),
    global_q: Tensor | None = None,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    scale: float | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Attention of every token of a canvas to its own tile, a halo around that tile, and some global tokens.

    The canvas is cut into ``ceil(H / th)`` by ``ceil(W / tw)`` tiles; the last one of a row or column may be smaller. A
    query sees the keys of its tile and of ``halo`` tokens more on each side. An open border clips this window; on a
    wrapped axis it goes on at the other side, and a key counts once. Cost and memory are linear in the canvas. Every
    query also sees all global tokens, in the same softmax (online, Milakov and Gimelshein 2018; Dao 2022), in float32
    at least.

    Forward only: a backward pass through the result warns, and its inputs get no gradient.

    Args:
        q, k, v: ``[B, H*W, heads, D]``, tokens row-major; float16, bfloat16, float32 or float64, all of one dtype.
            Copied only if the last dimension is not contiguous. Triton takes D up to 160, tuned for 40, 64, 80, 96, 128
            and 160. float64 needs ``"sdpa"`` or ``"reference"``.
        canvas: ``(H, W)`` in tokens.
        tile: ``(th, tw)`` in tokens; larger than the canvas means one tile.
        halo: ``(hy, hx)`` in tokens.
        wrap: whether the canvas is a circle along (y, x).
        global_q: ``[B, H*W, heads, D]``, queries for the global keys where they differ (rotary positions); None means
            q.
        global_k, global_v: ``[B, G, heads, D]``, keys and values that every query sees; both or neither.
        scale: of the scores; None means ``D ** -0.5``.
        impl: ``"reference"``, ``"native"``, ``"triton"``, or by gathering ``"sdpa"``, ``"flash"``, ``"cudnn"`` or
            ``"xformers"``; None picks the fastest one available.

    Returns:
        ``[B, H*W, heads, D]`` of q's dtype, contiguous, without a gradient.

    Raises:
        TypeError: a tensor is not one, or is not of such a dtype.
        ValueError: a shape, size, device, scale or ``impl`` is not as above.
        RuntimeError: the named ``impl`` is unavailable here.
    """
    _check_tokens("q", q)
    canvas, tile, halo = (
        _check_pair(name, pair, least)
        for name, pair, least in (("canvas", canvas, 1), ("tile", tile, 1), ("halo", halo, 0))
    )
    if not isinstance(wrap, tuple | list) or len(wrap) != 2 or not all(isinstance(w, bool) for w in wrap):
        raise ValueError(f"wrap={wrap!r} must be a (y, x) pair of bools")
    B, N, heads, D = q.shape
    if canvas[0] * canvas[1] != N:
        raise ValueError(f"canvas={canvas} has {canvas[0] * canvas[1]} tokens, but q has {N}: {tuple(q.shape)}")
    if B < 1 or heads < 1 or D < 1:
        raise ValueError(f"q must be [B, tokens, heads, D] with no dimension 0, got {tuple(q.shape)}")
    _check_tokens("k", k, q, N)
    _check_tokens("v", v, q, N)
    if (global_k is None) != (global_v is None):
        missing, given = ("global_v", "global_k") if global_v is None else ("global_k", "global_v")
        raise ValueError(f"{missing}=None, but {given} was given: give both or neither")
    if global_k is not None and global_v is not None:
        _check_tokens("global_k", global_k, q)
        _check_tokens("global_v", global_v, q, global_k.shape[1])
    if global_q is not None:
        if global_k is None:
            raise ValueError("global_q was given without global_k and global_v, so it would do nothing")
        _check_tokens("global_q", global_q, q, N)
    if global_k is not None and global_k.shape[1] == 0:
        global_q = global_k = global_v = None
    scale = D**-0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    if scale < 0:  # kernels take the maximum before they scale
        q, global_q, scale = -q, None if global_q is None else -global_q, -scale
    op = getattr(torch.ops.tiledcore, _op_name(_implementation(q, impl), q.device, q.dtype, D, tile[0] * tile[1]))
    tensors = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, global_q, global_k, global_v)]
    return op(*tensors, canvas, tile, halo, tuple(wrap), scale)


def _op_name(impl: Impl | None, device: torch.device, dtype: torch.dtype, D: int, queries: int) -> str:
    if impl is None and (named := fastest(device, D, queries)):
        impl = named if unavailable("neighbor_attention", named, device, dtype) is None else None
    return str(choose("neighbor_attention", impl, device, dtype)).removeprefix("tiledcore.")


def fastest(device: torch.device, D: int, queries: int) -> Impl | None:
    """What was measured to be the fastest on such a GPU with so many queries a tile; None: the usual order."""
    if not FASTEST or device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    entry = FASTEST.get((10 * major + minor, D), {})
    return next((entry[least] for least in sorted(entry, reverse=True) if least <= queries), None)


# As torch.compiler.assume_constant_result, so that a compiled block has no graph break here, but without importing
# dynamo and Triton at once.
vars(_op_name)["_dynamo_marked_constant"] = True


def _implementation(q: Tensor, impl: Impl | None) -> Impl | None:
    """The implementation, where the dtype or the head dimension leaves only one."""
    if q.dtype == torch.float64 and impl in ("native", "triton"):
        raise TypeError(f"impl={impl!r} needs q of float16, bfloat16 or float32, got torch.float64")
    if impl is None and (q.dtype == torch.float64 or (q.is_cuda and q.shape[-1] > TRITON_HEAD_DIM)):
        return "sdpa"
    return impl
