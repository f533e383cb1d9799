"""group_norm_silu: GroupNorm with given statistics, then SiLU, over a band of rows."""

import torch
from torch import Tensor

from tiledcore.ops import reference
from tiledcore.ops.checks import BLEND_DTYPES, check_image, check_like
from tiledcore.ops.dispatch import Impl, choose, define

_SCHEMA = "(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool silu, Tensor(a!) out) -> ()"


def _fake(*_: object) -> None:
    """Nothing is returned, and shapes do not change."""


define("group_norm_silu", _SCHEMA, _fake)


@torch.library.impl("tiledcore::group_norm_silu_reference", ("cpu", "cuda"))
def _reference(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool, out: Tensor) -> None:
    out.copy_(reference.group_norm_silu(x, mean, rstd, weight, bias, silu))


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
        impl: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest one available.

    Returns:
        ``out``, without a gradient.

    Raises:
        TypeError: an argument is not a tensor of such a dtype.
        ValueError: a shape, device, layout or ``impl`` is not as above.
        RuntimeError: the named ``impl`` is unavailable here.
    """
    check_image("x", x, "[B, C, rows, W]", BLEND_DTYPES)
    B, C = x.shape[:2]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(mean, Tensor) or mean.dim() != 2:
        raise ValueError(f"mean must be a tensor [B, G], got {tuple(mean.shape) if isinstance(mean, Tensor) else mean}")
    G = mean.shape[1]
    if G == 0 or C % G:
        raise ValueError(f"mean has {G} groups, which do not divide the {C} channels of x")
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        check_like(name, statistic, (B, G), "[B, G]", exact, x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_like(name, parameter, (C,), "[C]", x.dtype, x)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        check_like("out", out, tuple(x.shape), "of x", x.dtype, x)
        if not _planes_contiguous(out):
            raise ValueError(f"out must have contiguous planes, got the strides {out.stride()}")
    x = x if _planes_contiguous(x) else x.contiguous()
    op = choose("group_norm_silu", impl, x.device, x.dtype)
    op(x, mean.contiguous(), rstd.contiguous(), weight.contiguous(), bias.contiguous(), silu, out)
    return out
