"""neighbor_attention: attention of each tile of a canvas to itself and a halo around it."""

import torch
from torch import Tensor

from tiledcore import validate
from tiledcore.ops import reference
from tiledcore.ops.dispatch import FLOATS, Impl, check_size, check_tensor, choose, define, unavailable
from tiledcore.ops.gathered_attention import GATHERED

TRITON_HEAD_DIM = 160  # the widest head that the Triton kernel takes

FASTEST: dict[tuple[int, int], dict[int, Impl]] = {}
"""(compute capability such as 90, D) -> from how many queries a tile -> the fastest. ``python -m bench tune`` measures
it on a card and writes the line above. Empty: nothing has been measured yet, and Triton is the default."""

IMPLS: tuple[Impl, ...] = ("reference", "native", "triton", *GATHERED)
define(
    "neighbor_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? global_q, Tensor? global_k, Tensor? global_v, SymInt[2] canvas, "
    "int[2] tile, int[2] halo, bool[2] wrap, float scale) -> Tensor",
    fake=lambda q, *_: q.new_empty(q.shape),
    reference=lambda q, k, v, global_q, global_k, global_v, canvas, tile, halo, wrap, scale: (
        reference.neighbor_attention(q, k, v, canvas, tile, halo, wrap, scale, global_q, global_k, global_v)
    ),
    **GATHERED,
)


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

    Returns:
        ``[B, H*W, heads, D]`` of q's dtype, contiguous.
    """
    dims = "[B, tokens, heads, D]"
    check_tensor("q", q, dims, FLOATS)
    B, N, heads, D = q.shape
    canvas, tile, halo = check_size("canvas", canvas), check_size("tile", tile), check_size("halo", halo, 0)
    wrap = validate.flags("wrap", wrap)
    if canvas[0] * canvas[1] != N:
        raise ValueError(f"canvas={canvas} has {canvas[0] * canvas[1]} tokens, but q has {N}: {tuple(q.shape)}")
    if B < 1 or heads < 1 or D < 1:
        raise ValueError(f"q must be [B, tokens, heads, D] with no dimension 0, got {tuple(q.shape)}")
    if (global_k is None) != (global_v is None) or (global_q is not None and global_k is None):
        raise ValueError("global_k, global_v: give both or neither; global_q needs them")
    for name, tensor in (("k", k), ("v", v), ("global_q", q if global_q is None else global_q)):
        check_tensor(name, tensor, dims, (q.dtype,), (B, N, heads, D), q)
    if global_k is not None:
        for name, text in (("global_k", global_k), ("global_v", global_v)):
            check_tensor(name, text, dims, (q.dtype,), (B, global_k.shape[1], heads, D), q)
        if global_k.shape[1] == 0:
            global_q = global_k = global_v = None
    op = getattr(torch.ops.tiledcore, _op_name(impl, q.device, q.dtype, D, tile[0] * tile[1]))
    tensors = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, global_q, global_k, global_v)]
    return op(*tensors, canvas, tile, halo, wrap, D**-0.5)


def _op_name(impl: Impl | None, device: torch.device, dtype: torch.dtype, D: int, queries: int) -> str:
    if impl is None and device.type == "cuda":
        named: Impl | None = "sdpa" if D > TRITON_HEAD_DIM else None
        if named is None and FASTEST and torch.cuda.is_available() and not torch.version.hip:
            major, minor = torch.cuda.get_device_capability(device)
            entry = FASTEST.get((10 * major + minor, D), {})
            named = next((entry[least] for least in sorted(entry, reverse=True) if least <= queries), None)
        if named is not None and unavailable("neighbor_attention", named, device, dtype) is None:
            impl = named
    return str(choose("neighbor_attention", impl, device, dtype)).removeprefix("tiledcore.")


# As torch.compiler.assume_constant_result, so that a compiled block has no graph break here, but without importing
# dynamo and Triton at once.
vars(_op_name)["_dynamo_marked_constant"] = True
