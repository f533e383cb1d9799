"""neighbor_attention against dense attention and against other sparse ones, in time and in useful FLOP/s.

Useful FLOPs are predicted, not counted: 4·D for each pair of a query and a key that it sees. Every candidate is charged
with the same ones, dense attention as well, so its TFLOP/s say how far from necessary it is. The ceiling is a matrix
product of the same dtype, timed in the same turns.

    python -m bench.bench_neighbor_attention [--device cuda --dtype float16] [--json out.json]
    python -m bench.bench_neighbor_attention --scaling
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench import case as suite
from bench import timing
from tiledcore import ops
from tiledcore.ops.attention import _batches

IMPLS: tuple[ops.Impl, ...] = ("sdpa", "native", "triton")


@dataclass(frozen=True)
class Case:
    name: str
    side: int  # of the canvas, in tokens
    tile: int
    halo: int
    heads: int
    D: int
    text: int = 0  # global tokens
    B: int = 1

    def keys(self) -> int:
        """Pairs of a query and a key of its window, of one head; windows are clipped."""
        along = 0
        for start in range(0, self.side, self.tile):
            stop = min(start + self.tile, self.side)
            along += (stop - start) * (min(stop + self.halo, self.side) - max(start - self.halo, 0))
        return along**2

    def flops(self) -> int:
        return 4 * self.D * self.heads * self.B * (self.keys() + self.side**2 * self.text)

    def arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Random inputs, q, k and v as chunks of a fused projection."""
        fused = torch.randn(self.B, self.side**2, 3 * self.heads * self.D, device=device).to(dtype)
        q, k, v = (part.unflatten(2, (self.heads, self.D)) for part in fused.chunk(3, 2))
        result = {"q": q, "k": k, "v": v, "canvas": (self.side,) * 2, "tile": (self.tile,) * 2}
        if self.text:
            text = torch.randn(2, self.B, self.text, self.heads, self.D, device=device).to(dtype)
            result |= {"global_k": text[0], "global_v": text[1]}
        return result | {"halo": (self.halo,) * 2}


# The canvas of a 4096² image. A tile is what the model was trained on: 1024² pixels.
CUDA_CASES = [
    Case("SDXL, first level with attention", 256, 64, 16, 10, 64, B=2),
    Case("SDXL, second level", 128, 32, 8, 20, 64, B=2),
    Case("SDXL, second level, eight neighbours", 128, 32, 32, 20, 64, B=2),
    Case("FLUX", 256, 64, 8, 24, 128, text=512),
]
CPU_CASES = [
    Case("SDXL, second level, 4 of 20 heads, 2048²", 64, 32, 8, 4, 64),
    Case("SDXL, second level, 4 of 20 heads, 2048², eight neighbours", 64, 32, 32, 4, 64),
    Case("FLUX, 2 of 24 heads, 1024²", 64, 32, 8, 2, 128, text=64),
    Case("the embedded model, 1024²", 64, 16, 4, 4, 40),
]


def dense(case: Case, q: Tensor, k: Tensor, v: Tensor, text: list[Tensor]) -> Tensor:
    """Every query sees everything: what a model does without tiles."""
    if text:
        k, v = torch.cat([k, text[0]], 1), torch.cat([v, text[1]], 1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


# ----------------------------------------------------------------------------- rivals on a GPU

PATCH = (8, 16)  # FlexAttention's blocks of 128 tokens, as patches of the canvas


def patch_major(case: Case) -> Tensor:
    """The token at each place when the tokens of a patch follow one another."""
    grid = torch.arange(case.side**2).view(case.side // PATCH[0], PATCH[0], case.side // PATCH[1], PATCH[1])
    return grid.permute(0, 2, 1, 3).flatten()


def block_mask(case: Case, device: torch.device) -> BlockMask:
    """Which patches each patch sees, in whole or in part, and after them all global tokens."""
    whole, some = [], []
    for patch in PATCH:
        start = torch.arange(0, case.side, patch)
        low = start // case.tile * case.tile - case.halo
        high = low + case.tile + 2 * case.halo
        whole.append((start >= low[:, None]) & (start + patch <= high[:, None]))
        some.append((start + patch > low[:, None]) & (start < high[:, None]))

    def blocks(axes: list[Tensor]) -> Tensor:
        seen = axes[0][:, None, :, None] & axes[1][None, :, None, :]
        return seen.flatten(2).flatten(0, 1)

    full = blocks(whole)
    part = blocks(some) & ~full
    text = torch.ones(len(full), case.text // 128, dtype=torch.bool)
    full, part = torch.cat([full, text], 1), torch.cat([part, ~text], 1)
    order = patch_major(case).to(device)
    rows, columns = order // case.side, order % case.side
    tokens, tile, halo = case.side**2, case.tile, case.halo

    def near(q: Tensor, k: Tensor) -> Tensor:
        start = q // tile * tile
        return (k >= start - halo) & (k < start + tile + halo)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = k.clamp(max=tokens - 1)
        return (k >= tokens) | (near(rows[q], rows[at]) & near(columns[q], columns[at]))

    def listed(mask: Tensor) -> tuple[Tensor, Tensor]:
        first = mask.int().argsort(dim=1, descending=True, stable=True)
        return mask.sum(1).int()[None, None].to(device), first.int()[None, None].to(device)

    lengths = (tokens, tokens + case.text)
    return BlockMask.from_kv_blocks(*listed(part), *listed(full), BLOCK_SIZE=128, mask_mod=seen, seq_lengths=lengths)


def flex(
    case: Case, q: Tensor, k: Tensor, v: Tensor, text: list[Tensor], compiled: bool = True
) -> Callable[[], Tensor]:
    """FlexAttention; the reordering of the tokens that it needs is done before and not timed."""
    if case.side % PATCH[0] or case.side % PATCH[1] or case.text % 128:
        raise ValueError(f"tokens do not divide into blocks of {PATCH}")
    order = patch_major(case).to(q.device)
    q, k, v = (t[:, order] for t in (q, k, v))
    if text:
        k, v = torch.cat([k, text[0]], 1), torch.cat([v, text[1]], 1)
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    mask = block_mask(case, q.device)
    function = torch.compile(flex_attention) if compiled else flex_attention
    return partial(function, q, k, v, block_mask=mask)


def natten(case: Case, q: Tensor, k: Tensor, v: Tensor, text: list[Tensor]) -> Callable[[], Tensor]:
    """Generalized neighborhood attention with the tile as stride: inside the canvas the windows are the op's.

    At the border it shifts a window inwards instead of clipping it, so that it computes somewhat more.
    """
    from natten import na2d

    q, k, v = (t.unflatten(1, (case.side, case.side)).contiguous() for t in (q, k, v))
    more = {"additional_keys": text[0], "additional_values": text[1]} if text else {}
    size = min(case.tile + 2 * case.halo, case.side)
    return partial(na2d, q, k, v, kernel_size=(size, size), stride=(case.tile, case.tile), **more)


def xformers(case: Case, q: Tensor, k: Tensor, v: Tensor, text: list[Tensor]) -> Callable[[], Tensor]:
    """Gather every window, then one block-diagonal call over all of them; the gathering is timed."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import BlockDiagonalMask

    if case.B != 1:
        raise ValueError("a block-diagonal mask takes one batch entry")
    queries, seen, lengths = [], [], []
    extra = torch.arange(case.side**2, case.side**2 + case.text)
    for at, window in _batches((case.side,) * 2, (case.tile,) * 2, (case.halo,) * 2, (False, False)):
        for tile, keys in zip(at, window, strict=True):
            queries.append(tile)
            seen.append(torch.cat([keys, extra]))
            lengths.append((len(tile), len(seen[-1])))
    at, window = torch.cat(queries).to(q.device), torch.cat(seen).to(q.device)
    mask = BlockDiagonalMask.from_seqlens([n for n, _ in lengths], [n for _, n in lengths])

    def run() -> Tensor:
        keys, values = (torch.cat([t, *text[i : i + 1]], 1)[:, window] for i, t in enumerate((k, v)))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        return out.index_copy_(1, at, memory_efficient_attention(q[:, at], keys, values, mask))

    return run


# ----------------------------------------------------------------------------- measurement


def candidates(
    case: Case, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """What can run here, ready to run, and why the others cannot."""
    arguments = case.arguments(device, dtype)
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    text = [arguments["global_k"], arguments["global_v"]] if case.text else []
    side = 8192 if device.type == "cuda" else 1024
    square = torch.randn(side, side, device=device).to(dtype)
    ready: dict[str, Callable[[], Tensor]] = {"matmul": partial(torch.mm, square, square)}
    missing: dict[str, str] = {}
    wanted: dict[str, Callable[[], Callable[[], Tensor]]] = {"dense": lambda: partial(dense, case, q, k, v, text)}
    for impl in IMPLS:
        if reason := suite.why_not("neighbor_attention", impl, device):
            missing[impl] = reason
        else:
            wanted[impl] = partial(partial, ops.neighbor_attention, **arguments, impl=impl)
    if device.type == "cuda":
        wanted["triton int8"] = partial(partial, ops.neighbor_attention, **arguments, impl="triton", precision="int8")
        for rival in (flex, natten, xformers):
            wanted[rival.__name__] = partial(rival, case, q, k, v, text)
    for name, prepare in wanted.items():
        try:
            run = prepare()
            run()
        except Exception as error:  # a rival that is not installed or refuses the shape is no reason to stop
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        else:
            ready[name] = run
    return ready, missing


def prepare(case: Case, device: torch.device, dtype: torch.dtype) -> suite.Ready:
    """For the suite: the implementations only on one set of inputs, and dense attention."""
    runs, missing = candidates(case, device, dtype)
    del runs["matmul"]
    arguments = case.arguments(device, dtype)
    for impl in IMPLS:
        if impl in runs:
            runs[impl] = partial(ops.neighbor_attention, **arguments, impl=impl)

    def errors() -> dict[str, float]:
        # Float64 has no fused SDPA on a GPU: its scores would not fit.
        wider = torch.float32 if device.type == "cuda" else torch.float64
        wide: dict[str, Any] = {k: v.to(wider) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        exact = ops.neighbor_attention(**wide, impl="sdpa")
        return {impl: suite.relative_error(runs[impl](), exact) for impl in IMPLS if impl in runs}

    tokens = case.B * case.heads * case.D * dtype.itemsize
    moved = tokens * (4 * case.side**2 + 2 * case.text)  # q, k, v and the result, once
    return suite.Ready(runs, "sdpa", dict.fromkeys(runs, moved), case.flops(), errors, missing)


def cases(device: torch.device | None = None) -> list[suite.Case]:
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return [
        suite.Case(
            "neighbor_attention",
            f"{case.name}: {case.side}x{case.side} tokens, tile {case.tile}, halo {case.halo}, batch {case.B}",
            f"windows gathered, SDPA in {'float32' if cuda else 'float64'}",
            partial(prepare, case),
            quick=cuda or case.name.startswith("the embedded"),
        )
        for case in (CUDA_CASES if cuda else CPU_CASES)
    ]


def compare(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    runs, missing = candidates(case, device, dtype)
    side = 8192 if device.type == "cuda" else 1024
    seconds = timing.interleaved(runs, device, rounds)
    ceiling = 2 * side**3 / seconds["matmul"]
    print(f"\n{case.name}: {case.side}x{case.side} tokens, tile {case.tile}, halo {case.halo}, batch {case.B}")
    print(f"{case.heads} heads of {case.D}, {case.text} global tokens: {case.flops() / 1e12:.4g} TFLOP")
    print(f"a product of {side}x{side} matrices: {ceiling / 1e12:.3g} TFLOP/s")
    print(f"{'':14}{'median ms':>10}{'speed-up':>10}{'TFLOP/s':>10}{'of matmul':>10}")
    rows: list[dict[str, Any]] = []
    for name, value in seconds.items():
        if name == "matmul":
            continue
        rate, speedup = case.flops() / value, seconds["sdpa"] / value
        print(f"{name:14}{value * 1e3:10.3f}{speedup:10.2f}{rate / 1e12:10.3f}{rate / ceiling:10.0%}")
        rows.append(
            {"case": case.name, "name": name, "seconds": value, "speedup_over_sdpa": speedup, "flops": case.flops()}
            | {"flops_per_second": rate, "matmul_flops_per_second": ceiling, "matmul_share": rate / ceiling}
        )
    for name, reason in missing.items():
        print(f"{name:14}not run: {reason}")
        rows.append({"case": case.name, "name": name, "not_run": reason})
    return rows


def scaling(device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """The op on 1 to 64 tiles. Windows are clipped at the border, so the work itself grows a little faster."""
    big = device.type == "cuda"
    cases = [Case(f"{n * n} tiles", 32 * n, 32, 8, 16 if big else 2, 64) for n in (1, 2, 3, 4, 6, 8)]
    areas, flops = [case.side**2 for case in cases], [case.flops() for case in cases]
    impls = [i for i in IMPLS if ops.unavailable("neighbor_attention", i, device) is None and (big or i != "triton")]
    times: dict[str, list[float]] = {}
    for impl in impls:
        runs = [partial(ops.neighbor_attention, **case.arguments(device, dtype), impl=impl) for case in cases]
        times[impl] = [timing.interleaved({impl: run}, device, rounds)[impl] for run in runs]
    rows: list[dict[str, Any]] = []
    for impl in impls:
        print(f"\n{impl}\n{'tiles':>8}{'median ms':>12}{'GFLOP':>10}{'GFLOP/s':>10}{'peak MB':>10}{'result MB':>11}")
        peaks = []
        for case, seconds in zip(cases, times[impl], strict=True):
            run = partial(ops.neighbor_attention, **case.arguments(device, dtype), impl=impl)
            run()  # what is allocated once is not the op's
            peaks.append(timing.peak_growth(run, device))
            rate, result = case.flops() / seconds / 1e9, case.side**2 * case.heads * case.D * dtype.itemsize / 1e6
            print(f"{case.name.split()[0]:>8}{seconds * 1e3:12.3f}{case.flops() / 1e9:10.3f}{rate:10.1f}", end="")
            print(f"{peaks[-1] / 1e6:10.1f}{result:11.1f}")
            row = {"case": case.name, "name": impl, "seconds": seconds, "flops": case.flops(), "peak_bytes": peaks[-1]}
            rows.append(row)
        lines: list[tuple[str, Sequence[float]]] = [("time", times[impl]), ("work", flops), ("peak", peaks)]
        fits = {name: timing.exponent(areas, line) for name, line in lines}
        print("fitted powers of the area: " + ", ".join(f"{name} {power:.2f}" for name, power in fits.items()))
        rows.append({"name": impl, "fitted_powers_of_the_area": fits})
    return rows


def main() -> None:
    options = timing.parser(__doc__.split("\n")[0] if __doc__ else None)
    options.add_argument("--scaling", action="store_true", help="time and memory from 1 to 64 tiles instead")
    args = options.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(timing.machine(device), args.dtype)
    with torch.inference_mode():
        if args.scaling:
            rows = scaling(device, dtype, args.rounds)
        else:
            cases = CUDA_CASES if device.type == "cuda" else CPU_CASES
            rows = [row for case in cases for row in compare(case, device, dtype, args.rounds)]
    timing.save(args.json, device, rows)


if __name__ == "__main__":
    main()
