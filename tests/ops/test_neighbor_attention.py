"""neighbor_attention: all implementations agree with the float64 oracle, and the oracle with masked attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given
from neighbor_cases import DEVICE, Case, cases, random_case
from tolerance import assert_close
from torch import Tensor

from tiledcore import ops
from tiledcore.ops import dispatch, reference

IMPLS: tuple[ops.Impl, ...] = ("reference", "native", "sdpa", "triton")
# Interpreted, NumPy warns of the NaNs that the tests put in, and of inf - inf where nothing is stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")


def runnable(dtype: torch.dtype = torch.float32, triton: bool = False) -> list[ops.Impl]:
    impls = [impl for impl in IMPLS if ops.unavailable("neighbor_attention", impl, DEVICE) is None]
    only_plain = [impl for impl in impls if impl in ("reference", "sdpa")]
    return only_plain if dtype == torch.float64 else [impl for impl in impls if triton or impl != "triton"]


def dirty_memory(like: Tensor) -> None:
    """Leave NaNs in the blocks that the allocator hands out next, to expose outputs left unwritten."""
    for _ in range(3):
        torch.full_like(like, torch.nan, memory_format=torch.contiguous_format)


# ----------------------------------------------------------------------------- the oracle


@examples(15, 200)
@given(case=cases(torch.float64))
def test_oracle_is_attention_under_a_mask(case: Case) -> None:
    torch.testing.assert_close(case.exact(), case.plain(), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------- implementations


def slack(case: Case, dtype: torch.dtype) -> float:
    """What rounding may cost where the plain computation happens to be exact, as it does on tiny cases.

    The terms of a sum may cancel, so it follows from their size, and not from the result's: weights are off by the
    rounding of the scores' own terms, and are themselves rounded to the dtype before they meet v.
    """
    tensors = {name: tensor.double().abs() for name, tensor in case.tensors.items()}
    term, key, query = (
        max(tensor.norm(dim=-1, p=p).max().item() for name, tensor in tensors.items() if name.endswith(letter))
        for letter, p in (("v", torch.inf), ("k", 2), ("q", 2))
    )
    sums = 4 * torch.finfo(torch.float32).eps * (1 + key * query * tensors["q"].shape[-1] ** -0.5)
    return term * (sums + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0))


def check(case: Case, impls: list[ops.Impl]) -> None:
    exact, plain = case.exact(), case.plain()
    spread = slack(case, plain.dtype) / 2 * (plain >= exact).double().sub(0.5).sign()
    for impl in impls:
        dirty_memory(case.tensors["q"])
        result = case.run(impl)
        assert result.dtype == plain.dtype and result.is_contiguous()
        assert_close(result, exact, plain.double() + spread)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_agrees_with_the_oracle(dtype: torch.dtype) -> None:
    @examples(10, 200)
    @given(case=cases(dtype))
    def agrees(case: Case) -> None:
        check(case, runnable(dtype))

    agrees()


@examples(8, 100)
@given(case=cases(torch.float64))
def test_float64_is_never_computed_in_less(case: Case) -> None:
    exact = case.exact()
    for impl in (None, *runnable(torch.float64)):
        torch.testing.assert_close(case.run(impl), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("D", [40, 64, 80, 96, 128, 160])
@pytest.mark.parametrize("own_queries", [False, True])
def test_every_head_dimension(D: int, own_queries: bool) -> None:
    """Large enough for several blocks of keys and several chunks of queries, each with a rest."""
    case = random_case((27, 25), (23, 22), (4, 5), (True, False), heads=1, D=D, G=70, own_queries=own_queries)
    exact, plain = case.run("sdpa", torch.float64), case.plain()
    for impl in runnable():
        if impl != "reference":
            assert_close(case.run(impl), exact, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_triton_agrees_with_the_oracle(dtype: torch.dtype) -> None:
    if reason := ops.unavailable("neighbor_attention", "triton", DEVICE):
        pytest.skip(reason)
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("interpreted tl.dot is wrong on bfloat16")

    @examples(2, 50)
    @given(case=cases(dtype, most=6, depths=(40, 64)))
    def agrees(case: Case) -> None:
        check(case, ["triton"])

    agrees()


def test_one_tile_is_plain_attention() -> None:
    case = random_case((12, 10), (12, 10), (0, 0), heads=1)
    q, k, v = (case.tensors[name].transpose(1, 2) for name in "qkv")
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2)
    for impl in runnable(triton=True):
        assert_close(case.run(impl), exact, plain)


@pytest.mark.parametrize("wrap", [(False, False), (True, True)])
def test_halo_as_large_as_the_canvas_is_plain_attention(wrap: tuple[bool, bool]) -> None:
    case = random_case((9, 7), (5, 4), (9, 7), wrap, heads=1, D=40)
    q, k, v = (case.tensors[name].transpose(1, 2) for name in "qkv")
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2)
    for impl in runnable(triton=True):
        assert_close(case.run(impl), exact, plain)


def test_without_halo_tiles_are_independent() -> None:
    case = random_case((8, 12), (4, 6), (0, 0), D=40)
    other = Case({name: tensor.clone() for name, tensor in case.tensors.items()}, case.geometry)
    outside = torch.ones(8, 12, dtype=torch.bool, device=DEVICE)
    outside[4:, :6] = False
    for tensor in other.tensors.values():
        tensor[:, outside.flatten()] = torch.nan
    for impl in runnable(triton=True):
        inside = ~outside.flatten()
        assert torch.equal(case.run(impl)[:, inside], other.run(impl)[:, inside]), impl


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores far above 65504, the largest half: each query's best key takes it all."""
    case = random_case((6, 8), (4, 4), (2, 2), heads=1, D=64, G=5, dtype=dtype)
    for name in ("q", "k", "global_k"):
        case.tensors[name] = (case.tensors[name] * 200).round()
    exact = case.exact()
    plain = reference.neighbor_attention(**case.at(torch.float32), **case.geometry).to(dtype)
    assert torch.einsum("bqhd,bkhd->bhqk", case.at(torch.float64)["q"], case.at(torch.float64)["k"]).max() > 1e6
    for impl in runnable(triton=True):
        assert_close(case.run(impl), exact, plain)


def test_nan_and_infinite_values_spread() -> None:
    """A NaN among the keys reaches every query that sees it, and no other."""
    case = random_case((8, 8), (4, 4), (1, 1), heads=1, D=40)
    case.tensors["k"][:, 9] = torch.nan  # (1, 1): seen by the first tile alone
    for impl in runnable(triton=True):
        hit = case.run(impl).isnan().all(-1).all(-1)[0].view(8, 8)
        assert hit[:4, :4].all() and hit.sum() == 16, impl


def test_no_global_tokens_is_none() -> None:
    case = random_case((4, 4), (2, 2), (1, 1), D=40)
    none = case.tensors["q"][:, :0]
    for impl in runnable(triton=True):
        assert torch.equal(case.run(impl), case.run(impl, global_k=none, global_v=none, global_q=case.tensors["q"]))


def test_threads_do_not_change_the_result() -> None:
    case = random_case((20, 20), (8, 8), (3, 3), G=3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.run())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def peak_growth(case: Case, impl: ops.Impl) -> int:
    """Bytes by which the process, or the GPU's allocator, grows at its peak during one call."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run(impl)
        return torch.cuda.max_memory_allocated() - before

    def high_water() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts at what is resident now
    except OSError as error:
        pytest.skip(f"the peak of memory cannot be measured here: {error}")
    before = high_water()
    case.run(impl)
    return high_water() - before


@pytest.mark.parametrize("impl", ["native", "sdpa"])
def test_no_buffer_of_tokens_squared(impl: ops.Impl) -> None:
    if reason := ops.unavailable("neighbor_attention", impl, DEVICE):
        pytest.skip(reason)
    case = random_case((96, 96), (16, 16), (4, 4), heads=1, D=8, G=4, own_queries=True)
    case.run(impl)  # what torch allocates once
    scores = 96**4 * 4
    assert peak_growth(case, impl) < scores / 4


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: ops.Impl) -> None:
    if reason := ops.unavailable("neighbor_attention", impl, DEVICE):
        pytest.skip(reason)
    op = getattr(torch.ops.tiledcore, f"neighbor_attention_{impl}").default
    q, k, v = torch.randn(1, 20, 3 * 40, device=DEVICE).unflatten(2, (3, 40)).chunk(3, 2)
    text = torch.randn(1, 3, 1, 40, device=DEVICE)
    rest = ((4, 5), (4, 3), (1, 1), (False, True), 0.2)
    torch.library.opcheck(op, (q, k, v, q + 1, text, text, *rest))
    if impl != "triton":  # interpreted, each check takes seconds
        torch.library.opcheck(op, (q, k, v, None, None, None, *rest))
        torch.library.opcheck(op, (q, k, v, None, text, text, *rest))


def test_compiles_without_a_graph_break() -> None:
    case = random_case((4, 6), (2, 3), (1, 1), G=2, D=40)

    def block(q: Tensor) -> Tensor:
        return ops.neighbor_attention(**case.tensors | {"q": q * 2}, **case.geometry) + 1

    compiled = torch.compile(block, backend="eager", fullgraph=True)
    q = case.tensors["q"]
    assert torch.equal(compiled(q), block(q))


def test_no_gradient() -> None:
    case = random_case((4, 4), (2, 2), (1, 1), D=40)
    case.tensors["q"].requires_grad_()
    for impl in runnable():
        with pytest.warns(UserWarning, match="autograd kernel was not registered"):
            case.run(impl).sum().backward()
        assert case.tensors["q"].grad is None, impl


# ----------------------------------------------------------------------------- choice and errors


def test_named_impl_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_native_missing", "no such file")
    case = Case({name: TOKENS.cpu() for name in "qkv"}, {"canvas": (4, 5), "tile": (2, 2), "halo": (1, 1)})
    with pytest.raises(RuntimeError, match="neighbor_attention: impl='native' is unavailable on cpu"):
        case.run("native")


TOKENS = torch.zeros(2, 20, 3, 8, device=DEVICE)
TEXT = torch.zeros(2, 6, 3, 8, device=DEVICE)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": None}, TypeError, "q must be a tensor .* got NoneType"),
        ({"q": TOKENS.int()}, TypeError, "q must be of dtype .* got torch.int32"),
        ({"q": TOKENS[0]}, ValueError, r"q must have the shape \[B, tokens, heads, D\], got \(20, 3, 8\)"),
        ({"canvas": (4, 6)}, ValueError, r"canvas=\(4, 6\) has 24 tokens, but q has 20"),
        ({"canvas": (20,)}, ValueError, r"canvas=\(20,\) must be a \(y, x\) pair of at least 1"),
        ({"tile": (0, 2)}, ValueError, r"tile=\(0, 2\) must be a \(y, x\) pair of at least 1"),
        ({"tile": 4}, ValueError, "tile=4 must be"),
        ({"halo": (1, -1)}, ValueError, r"halo=\(1, -1\) must be a \(y, x\) pair of at least 0"),
        ({"wrap": (1, 0)}, ValueError, r"wrap=\(1, 0\) must be"),
        ({"k": TOKENS[:, :, :2]}, ValueError, r"k must have the shape .* = \(2, 20, 3, 8\), got \(2, 20, 2, 8\)"),
        ({"v": TOKENS[..., :4]}, ValueError, r"v must have the shape .* got \(2, 20, 3, 4\)"),
        ({"k": TOKENS.half()}, TypeError, "k must be of dtype torch.float32, got torch.float16"),
        ({"k": TOKENS.to("meta")}, ValueError, "k is on meta, not on"),
        ({"global_k": TEXT}, ValueError, "global_k, global_v: give both or neither"),
        ({"global_v": TEXT}, ValueError, "global_k, global_v: give both or neither"),
        ({"global_q": TOKENS}, ValueError, "global_q needs them"),
        (
            {"global_k": TEXT, "global_v": TEXT[:, 1:]},
            ValueError,
            r"global_v must .* got \(2, 5, 3, 8\)",
        ),
        (
            {"global_k": TEXT[..., 1:], "global_v": TEXT},
            ValueError,
            r"global_k must .* got \(2, 6, 3, 7\)",
        ),
        (
            {"global_k": TEXT, "global_v": TEXT, "global_q": TEXT},
            ValueError,
            r"global_q must have .* \(2, 20,",
        ),
        ({"q": TOKENS[:0], "k": TOKENS[:0], "v": TOKENS[:0]}, ValueError, "no dimension 0"),
        (
            {"impl": "cuda"},
            ValueError,
            "impl='cuda' is not one of reference, native, triton, sdpa, flash, cudnn, xformers",
        ),
        ({name: TOKENS.double() for name in "qkv"} | {"impl": "native"}, RuntimeError, "it needs float16"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"q": TOKENS, "k": TOKENS, "v": TOKENS, "canvas": (4, 5), "tile": (2, 2), "halo": (1, 1)} | change
    with pytest.raises(error, match=words):
        ops.neighbor_attention(**arguments)


def test_native_refuses_what_would_leave_its_memory() -> None:
    if reason := ops.unavailable("neighbor_attention", "native", torch.device("cpu")):
        pytest.skip(reason)
    op, q = torch.ops.tiledcore.neighbor_attention_native, TOKENS.cpu()
    geometry = ((2, 2), (1, 1), (False, False), 1.0)
    with pytest.raises(RuntimeError, match=r"q must be \[B, 24, heads, D\]"):
        op(q, q, q, None, None, None, (4, 6), *geometry)
    with pytest.raises(RuntimeError, match=r"v must be \[B, 20, heads, D\]"):
        op(q, q, q[:, 1:], None, None, None, (4, 5), *geometry)
    with pytest.raises(RuntimeError, match="canvas, tile, halo and wrap must be pairs"):
        op(q, q, q, None, None, None, (4, 5), (0, 2), *geometry[1:])
    none = q[:1, :0]
    with pytest.raises(RuntimeError, match="canvas does not fit 64 bits"):  # 2^64 tokens wrap to none
        op(none, none, none, None, None, None, (2**32, 2**32), *geometry)
    with pytest.raises(RuntimeError, match="no dimension 0"):
        op(q[..., :0], q[..., :0], q[..., :0], None, None, None, (4, 5), *geometry)
    with pytest.raises(RuntimeError, match="global_k and global_v need each other"):
        op(q, q, q, None, q, None, (4, 5), *geometry)
