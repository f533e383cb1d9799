"""Neighbour attention on gathered windows: the pieces, and doubles of the libraries that need a GPU."""

import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given
from neighbor_cases import Case, cases, random_case
from tolerance import assert_close
from torch import Tensor

from tiledcore import ops
from tiledcore.ops import dispatch
from tiledcore.ops.neighbor_attention import GATHERED, gathered, pieces

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention on ``[B, heads, n, D]``, and the logarithm of the softmax's sum."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return (scores.softmax(-1) @ v.double()).to(q.dtype), scores.logsumexp(-1)


def arguments(case: Case) -> list[Any]:
    tensors = [case.tensors.get(name) for name in ("q", "k", "v", "global_q", "global_k", "global_v")]
    return [*tensors, *case.geometry.values(), case.tensors["q"].shape[-1] ** -0.5]


@pytest.mark.parametrize("most", [1, 40, 10**6])
def test_pieces_have_every_tile_once_and_keep_to_their_size(most: int) -> None:
    found = pieces((7, 9), (3, 4), (1, 2), (True, False), most, CPU)
    assert torch.equal(torch.cat([queries.flatten() for queries, _ in found]).sort().values, torch.arange(63))
    for queries, keys in found:
        assert len(queries) == len(keys)
        assert len(queries) == 1 or queries.numel() + keys.numel() <= most
    assert most > 40 or len(found) > 4


@pytest.mark.parametrize("padding", [0, 5])
def test_xformers_gets_equal_windows(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A double with the interface of xformers 0.0.35, one of whose kernels pads the logarithm."""

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, logs = plain(*(t.transpose(1, 2) for t in (q, k, v)), scale)
        return out.transpose(1, 2), torch.nn.functional.pad(logs, (0, padding))

    fmha = ModuleType("xformers.ops.fmha")
    fmha.memory_efficient_attention_forward_requires_grad = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fmha.__name__, fmha)

    @examples(20, 200)
    @given(case=cases(torch.float64, most=7))
    def agrees(case: Case) -> None:
        result = GATHERED["xformers"](*arguments(case))
        torch.testing.assert_close(result, case.exact(), rtol=1e-12, atol=1e-13)

    agrees()


@pytest.mark.parametrize("own_queries", [False, True])
def test_operators_are_called_with_equal_windows(own_queries: bool) -> None:
    """A double of cuDNN's operator: its logarithm has one more dimension than flash attention's."""

    def operator(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Any, ...]:
        out, logs = plain(query, key, value, scale)
        return out, logs[..., None], *[None] * 7

    case = random_case((9, 10), (4, 4), (2, 1), (False, True), G=5, own_queries=own_queries, D=16)
    result = gathered(operator, *arguments(case))
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
