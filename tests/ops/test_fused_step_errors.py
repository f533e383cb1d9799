"""fused_step: what is not valid is named, by the op and by its native implementation."""

from typing import Any

import pytest
import torch
from grids import product
from step_cases import problem

from tiledcore import ops
from tiledcore.ops import dispatch

GRID = ((10, 10), (6, 6), product([0, 4], [0, 4]))


def base(slots: int = 2, halves: int = 2) -> dict[str, Any]:
    return {name: None if v is None else v.cpu() for name, v in problem(GRID, slots, halves).items()}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tiles": torch.zeros(16, 3, 6, 6).int()}, TypeError, "tiles must be of dtype torch.float16 or"),
        ({"tiles": torch.zeros(16, 3, 6, 6).to(torch.float8_e5m2)}, TypeError, "tiles must be of dtype"),
        ({"tiles": torch.zeros(8, 3, 6, 6)}, ValueError, r"tiles must have the shape .* = \(16, 3, 6, 6\)"),
        ({"guidance_scale": None}, ValueError, r"tiles must have the shape .* = \(8, 3, 6, 6\)"),
        ({"offsets": product([0, 4], [0, 3])}, ValueError, "x = 9 to 9 of the canvas"),
        ({"offsets": product([0, 14], [0, 4])}, ValueError, "not on the canvas"),
        ({"state": torch.zeros(2, 2, 3, 10, 10).double()}, TypeError, "state must be of dtype torch.float32"),
        ({"state": torch.zeros(2, 3, 10, 10)}, ValueError, "state must have the shape"),
        ({"state": torch.zeros(9, 2, 3, 10, 10)}, ValueError, "state must have 1 to 8 slots, got 9"),
        ({"state": torch.zeros(2, 2, 3, 10, 10).mT}, ValueError, "state must be contiguous"),
        ({"table": torch.zeros(3, 2, 3)}, ValueError, r"table must have the shape \[n, S, S\+2\] = \(3, 2, 4\)"),
        ({"table": torch.zeros(0, 2, 4)}, ValueError, r"table must have the shape"),
        ({"table": torch.zeros(3, 2, 4).double()}, TypeError, "table must be of dtype torch.float32"),
        ({"table": [1.0]}, TypeError, "table must be a tensor"),
        ({"input_scale": torch.ones(3)}, ValueError, r"input_scale must have the shape \[n\+1\] = \(4,\)"),
        ({"step": torch.tensor([1], dtype=torch.int32)}, TypeError, "step must be of dtype torch.int64"),
        ({"step": torch.tensor(1)}, ValueError, r"step must have the shape \[1\]"),
        ({"step": torch.tensor([3])}, ValueError, "step=3 must be at least 0 and less than the 3 evaluations"),
        ({"model_input": torch.zeros(2, 3, 10, 10).half()}, TypeError, "model_input must be of dtype torch.float32"),
        ({"model_input": torch.zeros(2, 3, 10, 10).mT}, ValueError, "model_input must be contiguous"),
        ({"guidance_scale": torch.ones(3)}, ValueError, r"guidance_scale must have the shape \[1\] or \[B\] = \(2,\)"),
        ({"guidance_scale": 7.5}, TypeError, "guidance_scale must be a tensor"),
        ({"noise": torch.zeros(2, 3, 10)}, ValueError, "noise must have the shape"),
        ({"noise": None, "table": torch.ones(3, 2, 4)}, ValueError, r"noise=None, but table\[1\] has a coefficient"),
        ({"window": "hann"}, ValueError, "window='hann' must be one of mean, gaussian, ramp, core"),
        ({"ramp": 0}, ValueError, "ramp=0 must be an int of at least 1"),
        ({"ramp": 2.5}, ValueError, "ramp=2.5 must be an int"),
        ({"impl": "cpp"}, ValueError, "impl='cpp' is not one of"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ops.fused_step(**base() | change)


def test_named_impl_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_native_missing", "no such file")
    with pytest.raises(RuntimeError, match="fused_step: impl='native' is unavailable on cpu"):
        ops.fused_step(**base(), impl="native")


def test_native_refuses_what_would_leave_its_memory() -> None:
    if reason := ops.unavailable("fused_step", "native", torch.device("cpu")):
        pytest.skip(reason)
    op = torch.ops.tiledcore.fused_step_native
    for change, words in [
        ({"offsets": product([0, 10], [0, 4])}, "not on the canvas"),
        ({"tiles": torch.zeros(8, 3, 6, 6)}, "tiles has not the dtype or the shape"),
        ({"state": torch.zeros(9, 2, 3, 10, 10)}, "1 to 8 slots"),
        ({"state": torch.zeros(2, 2, 3, 10, 10).mT}, "contiguous"),
        ({"table": torch.zeros(3, 2, 3)}, "table has not"),
        ({"input_scale": torch.zeros(3)}, "input_scale has not"),
        ({"step": torch.tensor([-1])}, "step is -1"),
        ({"model_input": torch.zeros(2, 3, 10, 9)}, "model_input has not"),
        ({"guidance_scale": torch.zeros(3)}, "guidance_scale has not"),
        ({"noise": torch.zeros(1, 3, 10, 10)}, "noise has not"),
        ({"noise": None, "table": torch.ones(3, 2, 4)}, "needs noise"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            op(*(base() | change).values(), "ramp", 8)
    # 2^60 images without channels: 8 tiles of them, twice, are 2^64, which wraps to 0.
    huge = {"state": torch.zeros(2, 2**60, 0, 1, 1), "tiles": torch.zeros(0, 0, 1, 1)}
    huge |= {"offsets": product([0], [0]).expand(8, 2), "model_input": torch.zeros(2**60, 0, 1, 1)}
    with pytest.raises(RuntimeError, match="tiles times batch does not fit 64 bits"):
        op(*(base() | huge).values(), "ramp", 8)
