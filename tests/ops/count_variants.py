"""How many variants Triton compiles for a sequence of calls; run by test_variants.py with the interpreter off.

No kernel runs: each launch is only recorded, and Triton's own binder says which variant it needs on sm_90.
"""

import importlib
import json
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature


class Recorder:
    """Stands in for a kernel: ``kernel[grid](...)`` notes the variant."""

    def __init__(self, kernel: Any) -> None:
        self.variants: set[str] = set()
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        _, specialization, options = self.bind(*args, **kwargs)
        self.variants.add(str((specialization, options)))


def offsets(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows * columns, 2, dtype=torch.int32)


def gather(op: Callable[..., Any]) -> None:
    for B, C, H, W, h, w in ((1, 4, 64, 64, 16, 16), (2, 1, 65, 130, 1, 9), (1, 1, 48, 1, 3, 1)):
        op(torch.zeros(B, C, H, W), offsets(2, 3), h, w)


def blend(op: Callable[..., Any]) -> None:
    for T, H, W, h, w, ramp in ((1, 64, 64, 64, 64, 8), (16, 65, 1, 16, 1, 1), (6, 96, 130, 48, 31, 16)):
        op(torch.zeros(T, 4, h, w), offsets(1, T), H, W, "ramp", ramp)


def fused(op: Callable[..., Any]) -> None:
    for T, B, H, W, h, w, ramp in ((2, 1, 64, 64, 64, 64, 8), (16, 2, 65, 1, 16, 1, 1), (6, 1, 96, 130, 48, 31, 16)):
        state, scalar = torch.zeros(2, B, 4, H, W), torch.zeros(1)
        for noise in (None, state[0]):
            rest = (torch.zeros(3, 2, 4), torch.zeros(4), torch.zeros(1, dtype=torch.int64), state[0].clone(), scalar)
            op(torch.zeros(T * 2 * B, 4, h, w), offsets(1, T), state, *rest, noise, "ramp", ramp)


def norm(op: Callable[..., Any]) -> None:
    for C, G, rows, W in ((32, 32, 1, 64), (64, 32, 7, 96), (512, 1, 16, 1024), (32, 4, 3, 63), (32, 4, 5, 125)):
        x = torch.zeros(1, C, 20, W)
        op(x[:, :, :rows], torch.zeros(1, G), torch.zeros(1, G), torch.zeros(C), torch.zeros(C), True, x[:, :, :rows])


def attention(op: Callable[..., Any]) -> None:
    for B, heads, H, W, G in ((1, 1, 16, 16, 0), (2, 10, 9, 31, 77), (1, 24, 1, 64, 1)):
        q = torch.zeros(B, H * W, heads, 64)
        text = torch.zeros(B, G, heads, 64) if G else None
        op(q, q, q, None, text, text, (H, W), (8, 8), (2, 2), (False, True), 0.1)


CALLS = {
    "gather_tiles": gather,
    "blend_tiles": blend,
    "fused_step": fused,
    "group_norm_silu": norm,
    "neighbor_attention": attention,
}


def main() -> None:
    counts = {}
    for name, calls in CALLS.items():
        module = importlib.import_module(f"tiledcore.kernels.{name}")
        recorder = Recorder(getattr(module, f"{name}_kernel"))
        setattr(module, f"{name}_kernel", recorder)
        calls(getattr(module, name))
        counts[name] = len(recorder.variants)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
