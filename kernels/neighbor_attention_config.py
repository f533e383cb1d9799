"""Compile options for the neighbor_attention kernel: one table, per head dimension and architecture.

There is no tuning at run time. The table has the largest patches that compile without register spills on every
architecture (tests/test_aot.py).
"""

from functools import partial
from typing import Any, NamedTuple

import torch

HEAD_DIMS = (40, 64, 80, 96, 128, 160)
"""Head dimensions with an entry; other dimensions use the entry of the next larger one."""

DTYPES: dict[torch.dtype, str] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CAPABILITIES = (80, 86, 89, 90, 100, 120)
SCALARS = [
    *("heads", "tokens", "W", "G", "n_blocks", "factor"),
    *(f"{tensor}_{dim}" for tensor in ("q", "k", "v", "gq", "gk", "gv") for dim in "bth"),
]
"""Arguments for whose values Triton makes no specialised variants, so that the ahead-of-time table is complete."""
DESCRIPTORS = ("k_patches", "v_patches")


class Config(NamedTuple):
    """Compile options of one variant; patches are (rows, columns) of tokens."""

    query_patch: tuple[int, int]
    key_patch: tuple[int, int]
    warps: int
    stages: int
    unmasked: bool = True
    """Whether complete patches have a separate loop without masks, which needs more registers."""
    descriptors: bool = False
    """Whether that loop reads by tensor descriptors (TMA)."""
    products: str = "tf32"
    """How float32 is multiplied: three TF32 products give nearly full precision."""
    chunk: int = 0
    """Channels of the queries that are loaded again for each patch of keys; 0 keeps all in registers."""


def _rows(*configs: Config) -> dict[str, Config]:
    return dict(zip(("sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), configs, strict=True))


_Q128, _K128, _K64, _K32, _K16 = (8, 16), (8, 16), (8, 8), (4, 8), (4, 4)


def _half(key_patch: tuple[int, int], stages: int, unmasked: bool = True, descriptors: bool = False) -> Config:
    """128 queries and 8 warps: with fewer queries, the L2 cache cannot deliver the keys fast enough."""
    return Config(_Q128, key_patch, 8, stages, unmasked, descriptors)


_one_loop, _by_descriptors = partial(_half, unmasked=False), partial(_half, descriptors=True)
# Without wgmma (sm_80, sm_86, sm_120) each warp keeps its queries and its share of the keys in registers: 64 keys
# of more than 80 channels spill. On sm_90 and sm_100 keys of one power of two come by descriptors.
_HALF = {
    40: _rows(_half(_K64, 3), _half(_K64, 2), _half(_K128, 2), _half(_K128, 2), _half(_K64, 2)),
    64: _rows(_half(_K64, 3), _half(_K64, 2), _by_descriptors(_K128, 3), _by_descriptors(_K128, 2), _half(_K64, 2)),
    80: _rows(_half(_K64, 2), _half(_K64, 2), _half(_K64, 3), _half(_K64, 2), _half(_K32, 2)),
    96: _rows(_half(_K32, 3), _half(_K32, 2), _half(_K64, 3), _half(_K64, 2), _half(_K32, 2)),
    128: _rows(_half(_K32, 3), _half(_K32, 2), _by_descriptors(_K64, 3), _by_descriptors(_K64, 2), _one_loop(_K32, 2)),
    160: _rows(_one_loop(_K16, 2), _one_loop(_K16, 2), _half(_K64, 2), _half(_K64, 2), _one_loop(_K16, 2)),
}
# Three TF32 products need all operands twice in registers, so the queries are loaded again for each patch. A product
# on sm_90 has at least 64 queries.
_FLOAT_64 = Config(_K64, _K16, 4, 2, False, False, "tf32x3", 16)
_FLOAT_32 = Config(_K32, _K16, 4, 1, False, False, "tf32x3", 16)
_FLOAT_90 = _FLOAT_64._replace(stages=1)
_FLOAT = {
    D: _rows(*[_FLOAT_64] * 5) if D <= 64 else _rows(_FLOAT_32, _FLOAT_32, _FLOAT_90, _FLOAT_32, _FLOAT_32)
    for D in HEAD_DIMS
}


def split(D: int) -> tuple[int, int]:
    """Two powers of two whose sum is at least D; the second may be 0.

    With one power of two, D = 40, 80, 96 and 160 would cost 60, 60, 33 and 60 % more matrix products; as 32 + 16,
    64 + 16, 64 + 32 and 128 + 32 it is 20, 0, 0 and 0 %. 16 is the smallest side of a matrix product.
    """
    least = 16
    whole = max(least, 1 << (D - 1).bit_length())
    first = whole // 2
    second = max(least, 1 << (D - first - 1).bit_length()) if first < D else 0
    return (first, second) if least <= first and first + second < whole else (whole, 0)


def vector_of(D: int) -> int:
    """Elements per load: all strides must be multiples of this."""
    return 8 if D % 8 == 0 else 1


def architecture(capability: int) -> str:
    """The column of the table: architectures with the same matrix instructions and shared memory."""
    if capability == 80:
        return "sm_80"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(capability // 10, "sm_86")


def capability_of(device: torch.device) -> int:
    """Such as 89 for compute capability 8.9; any value in the interpreter."""
    if device.type != "cuda":
        return 89
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configuration(D: int, dtype: torch.dtype, capability: int) -> Config:
    """The entry of the table.

    Raises:
        ValueError: no entry has that many channels.
    """
    fitting = next((known for known in HEAD_DIMS if known >= D), None)
    if fitting is None:
        raise ValueError(f"q has {D} channels a head, but impl='triton' takes at most {HEAD_DIMS[-1]}: use impl='sdpa'")
    table = _FLOAT if dtype == torch.float32 else _HALF
    return table[fitting][architecture(capability)]


def signature_of(kernel: Any, element: str, constants: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The types of a kernel's arguments by name, and the pointers: torch aligns these to 16 bytes."""
    types = {"blocks": "*i32", "patches": "*i32", "factor": "fp32"}
    types |= {name: "i32" for name in SCALARS if name != "factor"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, f"*{element}") for name in kernel.arg_names}
    return signature, [name for name, kind in signature.items() if kind.startswith("*") and name not in DESCRIPTORS]
