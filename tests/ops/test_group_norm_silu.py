"""group_norm_silu: every implementation against the oracle in float64, and against torch's GroupNorm."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

from tiledcore import ops
from tiledcore.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def runnable() -> list[ops.Impl]:
    every: tuple[ops.Impl, ...] = ("reference", "native", "triton")
    return [impl for impl in every if ops.unavailable("group_norm_silu", impl, DEVICE) is None]


def arguments(B: int, C: int, H: int, W: int, G: int, dtype: torch.dtype) -> list[torch.Tensor]:
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x = 3 * torch.randn(B, C, H, W, dtype=torch.float64) + 1
    mean, rstd = torch.randn(B, G, dtype=exact), torch.rand(B, G, dtype=exact) * 3 + 0.1
    weight, bias = torch.randn(C, dtype=torch.float64), torch.randn(C, dtype=torch.float64)
    return [x.to(DEVICE, dtype), mean.to(DEVICE), rstd.to(DEVICE), weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)]


def plain(x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, silu: bool) -> torch.Tensor:
    """As one would write it in the low precision."""
    B, C = x.shape[:2]
    per_group = C // mean.shape[1]
    mean, rstd = (s.to(x.dtype).repeat_interleave(per_group, 1).view(B, C, 1, 1) for s in (mean, rstd))
    v = (x - mean) * rstd * weight.view(1, C, 1, 1) + bias.view(1, C, 1, 1)
    return F.silu(v) if silu else v


@examples(10, 200)
@given(
    dtype=st.sampled_from(DTYPES),
    B=st.integers(1, 2),
    G=st.integers(1, 3),
    per_group=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(16, 60)),  # enough values that the plain way errs somewhere
    silu=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_the_oracle(dtype, B, G, per_group, size, silu, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    given_arguments = arguments(B, G * per_group, *size, G, dtype)
    exact = reference.group_norm_silu(*(a.double() for a in given_arguments), silu)
    for impl in runnable():
        out = torch.full_like(given_arguments[0], float("nan"))
        assert ops.group_norm_silu(*given_arguments, silu=silu, out=out, impl=impl) is out
        assert_close(out, exact, plain(*given_arguments, silu))


@pytest.mark.parametrize("impl", runnable())
def test_is_torch_group_norm_where_the_statistics_are_the_bands(impl: ops.Impl) -> None:
    torch.manual_seed(0)
    x, _, _, weight, bias = arguments(2, 12, 70, 41, 3, torch.float64)
    variance, mean = torch.var_mean(x.view(2, 3, -1), 2, correction=0)
    result = ops.group_norm_silu(x, mean, (variance + 1e-6).rsqrt(), weight, bias, impl=impl)
    torch.testing.assert_close(result, F.silu(F.group_norm(x, 3, weight, bias, 1e-6)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", runnable())
def test_rows_of_a_larger_tensor_into_rows_of_another(impl: ops.Impl) -> None:
    torch.manual_seed(1)
    whole, *others = arguments(2, 6, 20, 300, 2, torch.float32)
    expected = ops.group_norm_silu(whole, *others, impl="reference")
    window = torch.full((2, 6, 13, 300), float("nan"), device=DEVICE)
    ops.group_norm_silu(whole[:, :, 5:16], *others, out=window[:, :, 2:], impl=impl)
    torch.testing.assert_close(window[:, :, 2:], expected[:, :, 5:16], rtol=1e-6, atol=1e-6)
    assert window[:, :, :2].isnan().all()
    last = whole.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.group_norm_silu(last, *others, impl=impl), expected, rtol=1e-6, atol=1e-6)
    ops.group_norm_silu(whole, *others, out=whole, impl=impl)
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", runnable())
def test_far_from_zero(impl: ops.Impl) -> None:
    """SiLU ends at 0 on one side and at its argument on the other; nothing overflows on the way."""
    x = torch.tensor([-3e4, -100.0, -20.0, 0.0, 20.0, 100.0, 3e4], device=DEVICE).view(1, 1, 1, 7)
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    result = ops.group_norm_silu(x, zero, one, one[0], zero[0], impl=impl)
    torch.testing.assert_close(result, F.silu(x.double()).float(), rtol=2e-6, atol=1e-30)
    nothing = ops.group_norm_silu(x * float("nan"), zero, one, one[0], zero[0], impl=impl)
    assert nothing.isnan().all()


@pytest.mark.parametrize("impl", runnable())
def test_opcheck(impl: ops.Impl) -> None:
    op = getattr(torch.ops.tiledcore, f"group_norm_silu_{impl}").default
    given_arguments = arguments(2, 6, 5, 7, 3, torch.float32)
    torch.library.opcheck(op, (*given_arguments, True, torch.empty_like(given_arguments[0])))


X, MEAN, RSTD, WEIGHT, BIAS = arguments(2, 6, 4, 5, 3, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": X.int()}, TypeError, "x must be of dtype torch.float16 or"),
        ({"x": X[0]}, ValueError, "x must have the shape"),
        ({"mean": MEAN[0]}, ValueError, r"mean must have the shape \[B, G\]"),
        ({"mean": MEAN[:, :0]}, ValueError, "mean has 0 groups"),
        ({"mean": torch.zeros(2, 4, device=DEVICE)}, ValueError, "4 groups, which do not divide the 6 channels"),
        ({"mean": MEAN.double()}, TypeError, "mean must be of dtype torch.float32"),
        ({"rstd": RSTD[:1]}, ValueError, r"rstd must have the shape \[B, G\] = \(2, 3\)"),
        ({"weight": WEIGHT[:5]}, ValueError, r"weight must have the shape \[C\] = \(6,\)"),
        ({"bias": BIAS.half()}, TypeError, "bias must be of dtype torch.float32"),
        ({"out": X[:, :, :2]}, ValueError, "out must have the shape"),
        ({"out": X.to(memory_format=torch.channels_last)}, ValueError, "out must have contiguous planes"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias is on meta"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    good = {"x": X, "mean": MEAN, "rstd": RSTD, "weight": WEIGHT, "bias": BIAS}
    with pytest.raises(error, match=words):
        ops.group_norm_silu(**(good | change))


def test_native_refuses_what_would_leave_its_memory() -> None:
    if reason := ops.unavailable("group_norm_silu", "native", torch.device("cpu")):
        pytest.skip(reason)
    x, mean, rstd, weight, bias = (t.cpu() for t in (X, MEAN, RSTD, WEIGHT, BIAS))
    op = torch.ops.tiledcore.group_norm_silu_native
    for bad in ((x, mean[:1], rstd, weight, bias), (x, mean, rstd, weight[:3], bias), (x.mT, mean, rstd, weight, bias)):
        with pytest.raises(RuntimeError, match=r"mean|weight|out|planes"):
            op(*bad, True, torch.empty_like(x))
