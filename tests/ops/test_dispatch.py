"""Which implementation is chosen on GPUs that are not here: old ones, and AMD's."""

import pytest
import torch

from tiledcore import ops

pytest.importorskip("triton")
CUDA = torch.device("cuda", 0)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None) -> None:
    """Let torch report a GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def chosen(name: str, dtype: torch.dtype) -> str:
    return str(ops.choose(name, None, CUDA, dtype)).removeprefix(f"tiledcore.{name}_")


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "attention", "blend"),
    [
        ((9, 0), None, torch.bfloat16, "triton", "triton"),
        ((8, 0), None, torch.bfloat16, "triton", "triton"),
        ((7, 5), None, torch.bfloat16, "sdpa", "reference"),
        ((7, 5), None, torch.float16, "sdpa", "triton"),
        ((9, 4), "6.4", torch.float16, "sdpa", "triton"),
        ((9, 4), "6.4", torch.bfloat16, "sdpa", "triton"),
    ],
)
def test_choice_by_capability(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    hip: str | None,
    dtype: torch.dtype,
    attention: str,
    blend: str,
) -> None:
    gpu(monkeypatch, capability, hip)
    assert chosen("neighbor_attention", dtype) == attention
    for name in ("gather_tiles", "blend_tiles", "fused_step", "group_norm_silu"):
        assert chosen(name, dtype) == blend


def test_a_named_kernel_that_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 4), "6.4")
    with pytest.raises(RuntimeError, match="the table of configurations is for NVIDIA GPUs"):
        ops.choose("neighbor_attention", "triton", CUDA, torch.float16)
    gpu(monkeypatch, (7, 5))
    with pytest.raises(RuntimeError, match=r"blend_tiles in torch\.bfloat16 needs compute capability 8\.0.* has 7\.5"):
        ops.choose("blend_tiles", "triton", CUDA, torch.bfloat16)


def test_a_plan_without_a_gpu_takes_a_recent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen("neighbor_attention", torch.bfloat16) == "triton"
