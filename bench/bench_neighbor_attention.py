"""Cases of neighbor_attention, against dense attention and FlexAttention (on a GPU).

All are charged with the useful FLOPs: 4·D for each pair of a query and a key that it sees.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.case import Case, Ready, implementations
from bench.measure import Run
from tiledcore import ops
from tiledcore.ops import neighbor_attention

IMPLS: tuple[ops.Impl, ...] = ("sdpa", "native", "triton", "flash", "cudnn", "xformers")


@dataclass(frozen=True)
class Shape:
    """A square canvas of tokens."""

    name: str
    side: int  # in tokens, as tile and halo
    tile: int
    halo: int
    heads: int
    D: int
    text: int = 0  # tokens that every query sees
    B: int = 1

    def flops(self) -> int:
        along = 0  # pairs of a query and a key of its window along one axis; windows are clipped at the border
        for at in range(self.side):
            start = at // self.tile * self.tile
            along += min(start + self.tile + self.halo, self.side) - max(start - self.halo, 0)
        return 4 * self.D * self.heads * self.B * (along**2 + self.side**2 * self.text)

    def arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Random inputs; q, k and v are parts of one fused projection, as in the networks."""
        fused = torch.randn(self.B, self.side**2, 3 * self.heads * self.D, device=device).to(dtype)
        q, k, v = (part.unflatten(2, (self.heads, self.D)) for part in fused.chunk(3, 2))
        sides = {"canvas": (self.side,) * 2, "tile": (self.tile,) * 2, "halo": (self.halo,) * 2}
        result: dict[str, Any] = {"q": q, "k": k, "v": v} | sides
        if self.text:
            text = torch.randn(2, self.B, self.text, self.heads, self.D, device=device).to(dtype)
            result |= {"global_k": text[0], "global_v": text[1]}
        return result


ODD = [Shape(f"odd, D={D}", 45, 16, 5, 2, D, text=7, B=2) for D in (40, 64, 80, 96, 128, 160)]
"""Parts of patches, and whole ones that are read by TMA: for the check, not for the time."""
# The canvas of a 4096² image. A tile is what the model was trained on: 1024² pixels.
CUDA_SHAPES = [
    Shape("SDXL, first level with attention", 256, 64, 16, 10, 64, B=2),
    Shape("SDXL, second level", 128, 32, 8, 20, 64, B=2),
    Shape("SDXL, second level, eight neighbours", 128, 32, 32, 20, 64, B=2),
    Shape("FLUX", 256, 64, 8, 24, 128, text=512),
]
CPU_SHAPES = [
    Shape("SDXL, second level, 4 of 20 heads, 2048²", 64, 32, 8, 4, 64),
    Shape("SDXL, second level, 4 of 20 heads, 2048², eight neighbours", 64, 32, 32, 4, 64),
    Shape("FLUX, 2 of 24 heads, 1024²", 64, 32, 8, 2, 128, text=64),
    Shape("the embedded model, 1024²", 64, 16, 4, 4, 40),
]


def with_text(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, tokens + text, heads, D]``."""
    k, v = (torch.cat([arguments[x], arguments.get(f"global_{x}", arguments[x][:, :0])], 1) for x in "kv")
    return k, v


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees everything: what a model does without tiles."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


FEW = 256  # queries of dense attention that are compared
PATCH = (8, 16)  # FlexAttention's blocks of 128 tokens, as patches of the canvas


def patch_major(shape: Shape) -> Tensor:
    """The token at each place when the tokens of a patch follow one another."""
    y, x = PATCH
    grid = torch.arange(shape.side**2).view(shape.side // y, y, shape.side // x, x)
    return grid.permute(0, 2, 1, 3).flatten()


def block_mask(shape: Shape, device: torch.device) -> BlockMask:
    """FlexAttention's mask for tokens in patch-major order, text last."""
    order = patch_major(shape).to(device)
    rows, columns = order // shape.side, order % shape.side
    tokens, tile, halo = shape.side**2, shape.tile, shape.halo

    def near(q: Tensor, k: Tensor) -> Tensor:
        start = q // tile * tile
        return (k >= start - halo) & (k < start + tile + halo)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = k.clamp(max=tokens - 1)
        return (k >= tokens) | (near(rows[q], rows[at]) & near(columns[q], columns[at]))

    return create_block_mask(seen, None, None, tokens, tokens + shape.text, device=str(device))


def flex(shape: Shape, arguments: dict[str, Any]) -> Callable[[], Tensor]:
    """FlexAttention, by FlashAttention-4 if that is installed. Tokens are reordered before, which is not timed."""
    options = {"BACKEND": "FLASH"} if find_spec("flash_attn") and find_spec("flash_attn.cute") else None
    q, order = arguments["q"], patch_major(shape).to(arguments["q"].device)
    inputs = arguments | {name: arguments[name][:, order] for name in "qkv"}
    q, k, v = (t.transpose(1, 2).contiguous() for t in (inputs["q"], *with_text(inputs)))
    mask = block_mask(shape, q.device)
    return partial(torch.compile(flex_attention), q, k, v, block_mask=mask, kernel_options=options)


def prepare(shape: Shape, compiled: bool, device: torch.device, dtype: torch.dtype) -> Ready:
    arguments = shape.arguments(device, dtype)
    ours, missing = implementations("neighbor_attention", partial(ops.neighbor_attention, **arguments), device, IMPLS)
    runs: dict[str, Run] = {"dense": partial(dense, arguments["q"], *with_text(arguments)), **ours}
    shown: dict[str, Callable[[Tensor], Tensor]] = {"dense": lambda out: out[:, :, :FEW]}
    if compiled:
        runs = {"flex": flex(shape, arguments)}
        shown["flex"] = lambda out: out.transpose(1, 2)[:, patch_major(shape).argsort().to(device)]
    # In float64 a GPU has no fused attention, and the scores would not fit into memory.
    wide = torch.float32 if device.type == "cuda" else torch.float64
    widened: dict[str, Any] = {k: v.to(wide) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    moved = shape.B * shape.heads * shape.D * dtype.itemsize * (4 * shape.side**2 + 2 * shape.text)  # q, k, v, result
    return Ready(
        runs,
        baseline="sdpa",
        bytes=dict.fromkeys(runs, moved),
        flops=shape.flops(),
        expected=partial(ops.neighbor_attention, **widened, impl="sdpa"),
        others={"dense": lambda: dense(widened["q"][:, :FEW], *with_text(widened))},
        shown=shown,
        not_run=missing,
    )


def cases() -> Iterator[Case]:
    cuda = torch.cuda.is_available()
    flexible = [(CUDA_SHAPES[0], True)] if cuda else []  # each shape is a compilation
    for s, compiled in [*((s, False) for s in (*(CUDA_SHAPES if cuda else CPU_SHAPES), *ODD)), *flexible]:
        about = f"{s.name}: {s.side}x{s.side} tokens, tile {s.tile}, halo {s.halo}, batch {s.B}"
        yield Case(
            "neighbor_attention",
            about + compiled * ", FlexAttention",
            f"windows gathered, dense attention in {'float32' if cuda else 'float64'}",
            partial(prepare, s, compiled),
            quick=s in ODD or s.name.startswith("the embedded"),
        )


TABLE = Path(neighbor_attention.__code__.co_filename)


def tuned(source: str, capability: int, rows: dict[Shape, list[dict[str, Any]]]) -> str:
    """The file with the table, in which the entries of one capability are as the rows of its shapes say.

    Of shapes with the same D and tile, the one with the fewest FLOPs decides: the halo that is used by default.
    """
    line = re.search(r"^(FASTEST: .*?\] = )(\{.*\})$", source, re.MULTILINE)
    if line is None:
        raise ValueError(f"{TABLE}: has no line FASTEST = {{...}}")
    table = {key: entry for key, entry in ast.literal_eval(line[2]).items() if key[0] != capability}
    for shape in sorted(rows, key=lambda shape: -shape.flops()):
        timed = {row["name"]: row["seconds"] for row in rows[shape] if "seconds" in row and row["name"] in IMPLS}
        if timed:
            table.setdefault((capability, shape.D), {})[shape.tile**2] = min(timed, key=lambda name: timed[name])
    for entry in table.values():
        entry[0] = entry[min(entry)]
    return source.replace(line[0], line[1] + str({key: dict(sorted(table[key].items())) for key in sorted(table)}))
