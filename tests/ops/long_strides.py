"""Attention of tensors whose batch entries lie 2**31 elements apart; run by test_neighbor_attention_triton.py.

The storage is 4 GiB of virtual memory of which a few pages are touched.
"""

import torch
from triton.runtime.interpreter import GridExecutor

from tiledcore import ops

# After a launch the interpreter copies every storage back to the device. Here that would be onto itself.
GridExecutor._restore_args_dev = lambda *_: None

SHAPE = (2, 16, 1, 40)


def far(seed: int) -> torch.Tensor:
    """Random ``[2, 16, 1, 40]`` in float16 with a batch stride of 2**31."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).half()
    spread = torch.empty(2**31 + 16 * 40, dtype=torch.float16).as_strided(SHAPE, (2**31, 40, 40, 1))
    return spread.copy_(values)


q, k, v = (far(seed) for seed in range(3))
geometry = {"canvas": (4, 4), "tile": (4, 4), "halo": (0, 0)}
for text in ({}, {"global_q": q, "global_k": k, "global_v": v}):
    result = ops.neighbor_attention(q, k, v, **geometry, **text, impl="triton")
    near = {name: tensor.contiguous() for name, tensor in text.items()}
    wanted = ops.neighbor_attention(q.contiguous(), k.contiguous(), v.contiguous(), **geometry, **near, impl="triton")
    assert torch.equal(result, wanted)
