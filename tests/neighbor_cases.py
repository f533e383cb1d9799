"""Problems for neighbor_attention's tests, drawn or random, and plain attention under a mask to compare with."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tiledcore import ops
from tiledcore.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Case:
    """One problem: geometry, tensors in their dtype, and the arguments of the op."""

    tensors: dict[str, Tensor]
    geometry: dict[str, Any]

    def at(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in self.tensors.items()}

    def run(self, impl: ops.Impl | None = None, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        tensors = self.at(dtype) if dtype else self.tensors
        return ops.neighbor_attention(**tensors, **self.geometry, impl=impl, **more)

    def exact(self) -> Tensor:
        return reference.neighbor_attention(**self.at(torch.float64), **self.geometry)

    def plain(self) -> Tensor:
        """Attention over all tokens under a mask, everything in the tensors' own dtype."""
        t = self.tensors
        scale = t["q"].shape[-1] ** -0.5
        scores = torch.einsum("bqhd,bkhd->bhqk", t["q"], t["k"]) * scale
        scores = scores.masked_fill(~visible(**self.geometry).to(scores.device), -torch.inf)
        values = t["v"]
        if "global_k" in t:
            others = torch.einsum("bqhd,bkhd->bhqk", t.get("global_q", t["q"]), t["global_k"]) * scale
            scores, values = torch.cat([scores, others], 3), torch.cat([values, t["global_v"]], 1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(3), values)


def visible(canvas: tuple[int, int], tile: tuple[int, int], halo: tuple[int, int], wrap: tuple[bool, bool]) -> Tensor:
    """``[N, N]``: which keys each query sees, from distances to the query's tile."""
    axes = []
    for size, extent, reach, around in zip(canvas, tile, halo, wrap, strict=True):
        at = torch.arange(size)
        first = at // extent * extent
        last = (first + extent - 1).clamp(max=size - 1)
        before, after = first[:, None] - at, at - last[:, None]
        if around:  # the way to the tile on either side of the circle
            away = torch.minimum(before % size, after % size)
            away[(before <= 0) & (after <= 0)] = 0
        else:
            away = torch.maximum(before, after)
        axes.append(away <= reach)
    return torch.einsum("ab,cd->acbd", *(a.int() for a in axes)).bool().reshape(canvas[0] * canvas[1], -1)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values as a view into a larger tensor, whose rest is NaN, or transposed."""
    B, N, heads, D = tensor.shape
    if layout == "fused":  # as chunking a fused projection gives, with NaN tokens before and after
        buffer = tensor.new_full((B, N + 2, 3 * heads * D), torch.nan)
        view = buffer[:, 1:-1, heads * D : 2 * heads * D].unflatten(2, (heads, D))
    elif layout == "heads first":
        view = tensor.new_full((B, heads + 1, N + 2, D + 3), torch.nan)[:, 1:, 1:-1, :D].transpose(1, 2)
    elif layout == "last strided":
        view = tensor.new_full((B, N, heads, D, 2), torch.nan)[..., 1]
    else:
        return tensor
    view.copy_(tensor)
    return view


LAYOUTS = ("contiguous", "fused", "heads first", "last strided")


@st.composite
def cases(
    draw: st.DrawFn,
    dtype: torch.dtype = torch.float32,
    most: int = 11,
    depths: tuple[int, ...] = (1, 3, 8, 17, 40, 64, 80),
    layouts: tuple[str, ...] = LAYOUTS,
) -> Case:
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    canvas, tile, halo = draw(pair(1, most)), draw(pair(1, most + 2)), draw(pair(0, most + 3))
    wrap = draw(st.tuples(st.booleans(), st.booleans()))
    B, heads, D = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from(depths))
    G, own_queries = draw(st.integers(0, 4)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(tokens: int) -> Tensor:
        values = torch.randn(B, tokens, heads, D, generator=generator, dtype=torch.float64)
        return lay_out(values.to(DEVICE, dtype), draw(st.sampled_from(layouts)))

    N = canvas[0] * canvas[1]
    tensors = {"q": tensor(N), "k": tensor(N), "v": tensor(N)}
    if G:
        tensors |= {"global_k": tensor(G), "global_v": tensor(G)}
        if own_queries:
            tensors["global_q"] = tensor(N)
    return Case(tensors, {"canvas": canvas, "tile": tile, "halo": halo, "wrap": wrap})


def random_case(
    canvas: tuple[int, int],
    tile: tuple[int, int],
    halo: tuple[int, int],
    wrap: tuple[bool, bool] = (False, False),
    heads: int = 2,
    D: int = 64,
    G: int = 0,
    own_queries: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    names = ["q", "k", "v", *["global_k", "global_v"] * bool(G), *["global_q"] * own_queries]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        tokens = G if name in ("global_k", "global_v") else canvas[0] * canvas[1]
        tensors[name] = torch.randn(1, tokens, heads, D, generator=generator).to(DEVICE, dtype)
    return Case(tensors, {"canvas": canvas, "tile": tile, "halo": halo, "wrap": wrap})
