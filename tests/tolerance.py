"""How close a kernel's result must be: the rule for every op's tests.

The oracle is the reference in float64 on the same inputs. A kernel may err twice as much as the
plain computation in the low precision does, plus a few units in the last place. So the bound follows
from the problem, and not from what the kernel happens to reach.
"""

import torch
from torch import Tensor


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, ulps: float = 4) -> None:
    """Assert that ``actual`` is finite and as close to the oracle as its precision allows.

    Args:
        actual: the result under test, in its own dtype.
        exact: the oracle's result, float64.
        plain: what the plain computation gives in the precision under test.
        ulps: units in the last place of ``actual``'s dtype, relative to each exact value.
    """
    assert exact.dtype == torch.float64, f"the oracle must be float64, got {exact.dtype}"
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} != {tuple(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{(~torch.isfinite(actual)).sum()} values not finite"
    precision = torch.finfo(actual.dtype)
    # Around 0 a unit in the last place of the value means nothing: there the smallest normal counts.
    unit = precision.eps * exact.abs().clamp(min=precision.smallest_normal)
    allowed = 2 * (plain.double() - exact).abs().amax() + ulps * unit if exact.numel() else unit
    error = (actual.double() - exact).abs()
    worst = int((error - allowed).argmax()) if exact.numel() else 0
    assert (error <= allowed).all(), (
        f"{(error > allowed).sum()} of {error.numel()} values are off; the worst by "
        f"{error.flatten()[worst]:.3g} where {allowed.flatten()[worst]:.3g} is allowed"
    )
