"""Quantised networks in tiles, each where its library is installed (``pip install --no-deps``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tilings import RAMP
from tiny_transformers import build, call, tiny_flux
from torch.nn import Linear

from tiledcore import Execution, TiledPipeline, apply_tiling, remove_tiling

pytestmark = pytest.mark.slow


def torchao(network: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig())


def torchao_dynamic(network: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(network, quantization.Int8DynamicActivationInt8WeightConfig())


def quanto(network: Any) -> None:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(network, weights=library.qint8)
    library.freeze(network)


def gguf(network: Any) -> None:
    library = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    kind = library.GGMLQuantizationType.Q8_0
    packed = {
        f"{name}.weight": GGUFParameter(
            torch.from_numpy(library.quants.quantize(layer.weight.detach().numpy(), kind).copy()), quant_type=kind
        )
        for name, layer in network.named_modules()
        if isinstance(layer, Linear) and layer.in_features % 32 == 0
    }
    biases = {name: layer.bias for name, layer in network.named_modules() if isinstance(layer, Linear)}
    _replace_with_gguf_linear(network, torch.float32, packed)
    for name, weight in packed.items():
        layer = network.get_submodule(name.removesuffix(".weight"))
        layer.weight, layer.bias = weight, biases[name.removesuffix(".weight")]


def bitsandbytes_8(network: Any) -> None:
    library = pytest.importorskip("bitsandbytes").nn
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Linear):
            made = library.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            weight = library.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            _put(network, name, made, weight, layer.bias)


def bitsandbytes_4(network: Any) -> None:
    library = pytest.importorskip("bitsandbytes").nn
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Linear) and layer.in_features % 64 == 0:
            made = library.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32)
            _put(network, name, made, library.Params4bit(layer.weight.data, requires_grad=False), layer.bias)


def _put(network: Any, name: str, layer: Any, weight: Any, bias: Any) -> None:
    layer.weight, layer.bias = weight, bias
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, layer.to("cpu"))


@pytest.mark.parametrize("change", [torchao, torchao_dynamic, quanto, gguf, bitsandbytes_8, bitsandbytes_4])
def test_a_quantised_network(change: Callable[[Any], None]) -> None:
    full = call(apply_tiling(build(tiny_flux), RAMP), tiny_flux, (22, 32))
    pipe = build(tiny_flux)
    change(pipe.transformer)
    plain = call(pipe, tiny_flux, (16, 16))
    assert torch.equal(call(apply_tiling(pipe, RAMP), tiny_flux, (16, 16)), plain)
    four = call(pipe, tiny_flux, (22, 32))
    one = call(apply_tiling(pipe, RAMP, Execution(tile_batch=1)), tiny_flux, (22, 32))
    torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-4)
    assert 0 < float((four - full).norm() / full.norm()) < 0.02
    assert torch.equal(call(remove_tiling(pipe), tiny_flux, (16, 16)), plain)
    torch.testing.assert_close(call(TiledPipeline(pipe, RAMP), tiny_flux, (22, 32)), four, rtol=1e-4, atol=1e-4)
