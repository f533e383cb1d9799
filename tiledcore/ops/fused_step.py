"""fused_step: blend tiles, apply guidance and do one scheduler step, in one pass over the canvas."""

import torch
from torch import Tensor

from tiledcore.ops import dispatch, reference
from tiledcore.ops.dispatch import FLOATS, Impl, Window, check_offsets, check_size, check_tensor, check_window, choose

MAX_SLOTS = 8  # Slots of state that every implementation takes: the sample and up to seven of history

dispatch.define(
    "fused_step",
    "(Tensor tiles, Tensor offsets, Tensor(a!) state, Tensor table, Tensor input_scale, Tensor step, "
    "Tensor(b!) model_input, Tensor? guidance_scale, Tensor? noise, str window, int ramp) -> ()",
    fake=lambda *_: None,
    reference=reference.fused_step,
)


def fused_step(
    tiles: Tensor,
    offsets: Tensor,
    state: Tensor,
    table: Tensor,
    input_scale: Tensor,
    step: Tensor,
    *,
    model_input: Tensor,
    guidance_scale: Tensor | None = None,
    noise: Tensor | None = None,
    window: Window = "ramp",
    ramp: int = 8,
    impl: Impl | None = None,
) -> None:
    """Blend the tiles' predictions, apply guidance, and move the state on by one evaluation, in place.

    With ``i`` the value of ``step``, ``z`` the slots of ``state`` and ``m`` the guided prediction:

    - ``u, c = blend(tiles)`` as in :func:`blend_tiles`, and ``m = u + guidance_scale * (c - u)`` (classifier-free
      guidance, Ho and Salimans 2022); without a guidance scale ``m = blend(tiles)``.
    - ``z'[s] = Σ_j table[i, s, j] * z[j] + table[i, s, S] * m + table[i, s, S+1] * noise``, all from the old ``z``.
    - ``model_input = input_scale[i+1] * z'[0]``, what the network sees at the next evaluation.

    A term with coefficient 0 is left out, even if it is NaN, and what no result needs is not read. A slot whose row is
    the identity is not written. ``step`` is not changed. A prediction of the whole canvas is passed as one tile. Sums
    are in the state's dtype.

    Args:
        tiles: ``[T*G*B, C, h, w]``, float16, bfloat16, float32 or float64. ``G`` is 2 with ``guidance_scale``, else 1.
            Element ``(t*G + g)*B + b`` is tile t of image b, unconditional for g = 0.
        offsets: ``[T, 2]`` int32, as for :func:`blend_tiles`.
        state: ``[S, B, C, H, W]``, contiguous, float32, or float64 with float64 tiles; S from 1 to 8. Slot 0 is the
            sample, the rest is the scheduler's history. Changed in place.
        table: ``[n, S, S+2]`` of the state's dtype: the coefficients of every evaluation.
        input_scale: ``[n+1]`` of the state's dtype.
        step: ``[1]`` int64, the number of this evaluation, 0 to n - 1.
        model_input: ``[B, C, H, W]`` of the tiles' dtype, contiguous, sharing no memory with others. Overwritten.
        guidance_scale: ``[1]`` or ``[B]`` of the state's dtype; read on the device, so CUDA graphs can change it.
        noise: ``[B, C, H, W]`` of the state's dtype. Missing where the table needs it: an error on the CPU, NaN on
            CUDA.
        window, ramp: see :func:`blend_tiles`.
    """
    check_tensor("tiles", tiles, "[T*G*B, C, h, w]", FLOATS)
    exact = torch.promote_types(tiles.dtype, torch.float32)
    check_tensor("state", state, "[S, B, C, H, W]", (exact,), like=tiles)
    S, B, C, H, W = state.shape
    if not 1 <= S <= MAX_SLOTS:
        raise ValueError(f"state must have 1 to {MAX_SLOTS} slots, got {S}")
    tile = check_size("the tile's size", tiles.shape[2:])
    check_offsets(offsets, tiles, (H, W), tile, blended=True)
    count = len(offsets) * B * (1 if guidance_scale is None else 2)
    check_tensor("tiles", tiles, "[T*G*B, C, h, w]", shape=(count, C, *tile))
    n = max(1, len(table)) if isinstance(table, Tensor) and table.dim() else 1
    check_tensor("table", table, "[n, S, S+2]", (exact,), (n, S, S + 2), tiles)
    check_tensor("input_scale", input_scale, "[n+1]", (exact,), (n + 1,), tiles)
    check_tensor("step", step, "[1]", (torch.int64,), (1,), tiles)
    check_tensor("model_input", model_input, "[B, C, H, W]", (tiles.dtype,), (B, C, H, W), tiles)
    for name, tensor in (("state", state), ("model_input", model_input)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, as it is written in place, got strides {tensor.stride()}")
    if guidance_scale is not None:
        images = 1 if isinstance(guidance_scale, Tensor) and guidance_scale.shape == (1,) else B
        check_tensor("guidance_scale", guidance_scale, "[1] or [B]", (exact,), (images,), tiles)
    if noise is not None:
        check_tensor("noise", noise, "[B, C, H, W]", (exact,), (B, C, H, W), tiles)
    if dispatch.readable(step):
        if not 0 <= (i := int(step)) < n:
            raise ValueError(f"step={i} must be at least 0 and less than the {n} evaluations of table")
        if noise is None and bool((table[i, :, -1] != 0).any()):
            raise ValueError(f"noise=None, but table[{i}] has a coefficient for it")
    op = choose("fused_step", impl, tiles.device, tiles.dtype)
    given = (tiles, offsets, state, table, input_scale, step, model_input, guidance_scale, noise)
    op(*given, *check_window(window, ramp))
