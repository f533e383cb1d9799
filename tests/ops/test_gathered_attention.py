"""Neighbour attention on gathered windows: the pieces, and doubles of the libraries that need a GPU."""

import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given
from neighbor_cases import Case, cases, random_case
from tolerance import assert_close
from torch import Tensor

from tiledcore import ops
from tiledcore.ops import dispatch, gathered_attention
from tiledcore.ops.gathered_attention import pieces

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention on ``[B, heads, n, D]``, and the logarithm of the softmax's sum."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return (scores.softmax(-1) @ v.double()).to(q.dtype), scores.logsumexp(-1)


def arguments(case: Case) -> list[Any]:
    tensors = [case.tensors.get(name) for name in ("q", "k", "v", "global_q", "global_k", "global_v")]
    return [*tensors, *case.geometry.values(), case.tensors["q"].shape[-1] ** -0.5]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("most", [1, 40, 10**6])
def test_pieces_have_every_tile_once_and_keep_to_their_size(packed: bool, most: int) -> None:
    found = pieces((7, 9), (3, 4), (1, 2), (True, False), most, packed, CPU)
    assert torch.equal(torch.cat([piece.queries for piece in found]).sort().values, torch.arange(63))
    for piece in found:
        assert sum(piece.query_lengths) == len(piece.queries) and sum(piece.key_lengths) == len(piece.keys)
        assert packed or len({*piece.query_lengths}) == len({*piece.key_lengths}) == 1
        assert len(piece.query_lengths) == 1 or len(piece.queries) + len(piece.keys) <= most
    assert most > 40 or len(found) > 4
    assert not packed or most < 100 or len(found) == 1


@pytest.mark.parametrize("padded", [False, True], ids=["flash", "cutlass"])
def test_xformers_gets_all_windows_in_one_call(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A double with the interface of xformers 0.0.35. Its two kernels give the logarithm in two shapes."""
    calls: list[list[int]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: float) -> tuple[Tensor, Tensor]:
        assert q.shape[0] == k.shape[0] == 1 and q.dim() == 4
        calls.append(attn_bias.q)
        parts = zip(*(t[0].split(n) for t, n in ((q, attn_bias.q), (k, attn_bias.k), (v, attn_bias.k))), strict=True)
        found = [plain(*(t.transpose(0, 1) for t in part), scale) for part in parts]
        out = torch.cat([part.transpose(0, 1) for part, _ in found])[None]
        most = max(attn_bias.q) + 5
        rows = [torch.nn.functional.pad(logs, (0, most - logs.shape[1])) for _, logs in found]
        return out, torch.stack(rows) if padded else torch.cat([logs for _, logs in found], 1)[None]

    fmha, bias = ModuleType("xformers.ops.fmha"), ModuleType("xformers.ops.fmha.attn_bias")
    fmha.memory_efficient_attention_forward_requires_grad = attention  # type: ignore[attr-defined]
    bias.BlockDiagonalMask = SimpleNamespace(  # type: ignore[attr-defined]
        from_seqlens=lambda q, k, device: SimpleNamespace(q=list(q), k=list(k))
    )
    for module in (fmha, bias):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(gathered_attention, "_mask", gathered_attention._mask.__wrapped__)  # type: ignore[attr-defined]

    @examples(20, 200)
    @given(case=cases(torch.float64, most=7))
    def agrees(case: Case) -> None:
        calls.clear()
        torch.testing.assert_close(
            gathered_attention.GATHERED["xformers"](*arguments(case)), case.exact(), rtol=1e-12, atol=1e-13
        )
        assert len(calls) == 1 + ("global_k" in case.tensors)

    agrees()


@pytest.mark.parametrize("own_queries", [False, True])
def test_operators_are_called_with_equal_windows(own_queries: bool) -> None:
    """A double of cuDNN's operator: its logarithm has one more dimension than flash attention's."""

    def operator(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Any, ...]:
        out, logs = plain(query, key, value, scale)
        return out, logs[..., None], *[None] * 7

    case = random_case((9, 10), (4, 4), (2, 1), (False, True), G=5, own_queries=own_queries, D=16)
    result = gathered_attention.gathered(gathered_attention._sequences(operator), False, *arguments(case))
    assert_close(result, case.exact(), case.plain())


def test_torchs_operators_have_the_arguments_that_are_given() -> None:
    """Their names are private to torch, and no GPU is here to call them."""
    for name, start in {
        "flash": "Tensor query, Tensor key, Tensor value, float dropout_p=0.",
        "cudnn": "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float",
        "efficient": "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float",
    }.items():
        schema = str(getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default._schema)
        assert f"({start}" in schema and "*, float? scale=None" in schema
        assert re.search(r"-> \(Tensor output, Tensor (logsumexp|log_sumexp)", schema), schema


def test_named_libraries_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case((4, 4), (2, 2), (1, 1), D=8)
    cpu = Case({name: tensor.cpu() for name, tensor in case.tensors.items()}, case.geometry)
    for impl in ("cudnn", "xformers"):
        with pytest.raises(RuntimeError, match=f"impl='{impl}' is unavailable on cpu: {impl} has no attention on cpu"):
            cpu.run(impl)
    assert "float16 or bfloat16" in str(ops.unavailable("neighbor_attention", "cudnn", CUDA, torch.float32))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert ops.unavailable("neighbor_attention", "xformers", CUDA) == "xformers is not installed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert ops.unavailable("neighbor_attention", "flash", CUDA) == "flash needs compute capability 8.0"


def test_the_table_decides_by_capability_and_head_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    op = sys.modules["tiledcore.ops.neighbor_attention"]  # the package has a function of that name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(op, "FASTEST", {(90, 64): {0: "triton", 4096: "cudnn"}, (90, 128): {0: "xformers"}})
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name == "xformers" else name)

    def chosen(D: int, dtype: torch.dtype = torch.float16, queries: int = 4096) -> str:
        return op._op_name(None, CUDA, dtype, D, queries).removeprefix("neighbor_attention_")

    assert chosen(64) == "cudnn" and chosen(64, queries=1024) == "triton" and chosen(80) == "triton"
    assert chosen(64, torch.float32) == "triton"  # cuDNN has none
    assert chosen(128) == "triton"  # xformers is not installed
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert chosen(64) == "triton"
