"""group_norm_silu: GroupNorm with given statistics, then SiLU, over a band of rows."""

from typing import Any

import torch
from torch import Tensor

from tiledcore.ops import reference
from tiledcore.ops.dispatch import FLOATS, Impl, check_tensor, choose, define


def _reference(*arguments: Any) -> None:
    *given, out = arguments
    out.copy_(reference.group_norm_silu(*given))


define(
    "group_norm_silu",
    "(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool silu, Tensor(a!) out) -> ()",
    fake=lambda *_: None,
    reference=_reference,
)


def _planes_contiguous(tensor: Tensor) -> bool:
    H, W = tensor.shape[2:]
    return (W == 1 or tensor.stride(3) == 1) and (H == 1 or tensor.stride(2) == W)


def group_norm_silu(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    silu: bool = True,
    out: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """GroupNorm (Wu and He 2018) with given statistics, then SiLU, in one pass over a band of rows.

    Per channel ``v = (x - mean) * rstd * weight + bias``; the result is ``v / (1 + exp(-v))``. With the statistics of
    the whole image, a band comes out as it would in the whole image. Computed in float32 (float64 for float64), rounded
    once.

    Args:
        x: ``[B, C, rows, W]``, float16, bfloat16, float32 or float64. Copied only if a channel's rows are not
            contiguous.
        mean: ``[B, G]`` float32 (float64 with float64), one value per group of channels; ``G`` divides ``C``.
        rstd: ``[B, G]``, as ``mean``: ``1 / sqrt(variance + eps)``.
        weight: ``[C]`` of the dtype of ``x``.
        bias: ``[C]`` of the dtype of ``x``.
        silu: if False, the result is ``v``.
        out: result tensor of the shape and dtype of ``x``, with contiguous planes; may be ``x`` itself. None: a new
            one.

    Returns:
        ``out``.
    """
    check_tensor("x", x, "[B, C, rows, W]", FLOATS)
    B, C = x.shape[:2]
    exact = (torch.promote_types(x.dtype, torch.float32),)
    check_tensor("mean", mean, "[B, G]", exact, like=x)
    G = mean.shape[1]
    if G == 0 or C % G:
        raise ValueError(f"mean has {G} groups, which do not divide the {C} channels of x")
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        check_tensor(name, statistic, "[B, G]", exact, (B, G), x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor(name, parameter, "[C]", (x.dtype,), (C,), x)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_tensor("out", out, "[B, C, rows, W]", (x.dtype,), tuple(x.shape), x)
    if not _planes_contiguous(out):
        raise ValueError(f"out must have contiguous planes, got the strides {out.stride()}")
    x = x if _planes_contiguous(x) else x.contiguous()
    op = choose("group_norm_silu", impl, x.device, x.dtype)
    op(x, mean.contiguous(), rstd.contiguous(), weight.contiguous(), bias.contiguous(), silu, out)
    return out
