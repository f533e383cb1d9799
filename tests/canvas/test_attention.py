"""Canvas mode: neighbour attention inside diffusers' own networks, against the plain networks and brute force."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from networks import FAMILIES, NATIVE, build, flux, make, normal, same, sd3
from torch import Tensor

from tiledcore import ops
from tiledcore.canvas import attention, processors
from tiledcore.canvas.attention import CanvasAttention, remove
from tiledcore.config import Execution, TilingConfig
from tiledcore.geometry import Pair, both
from tiledcore.utils import around_of

EVERY = pytest.mark.parametrize("family", FAMILIES)
NEIGHBOUR = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sana"])


def install(
    network: Any, native: int | Pair | None = None, guidance_batch: bool = True, **tiling: Any
) -> CanvasAttention:
    config = TilingConfig(mode="canvas", **tiling)
    own = both(tiling["tile"] if native is None else native)
    return attention.install(network, config, Execution(guidance_batch=guidance_batch), own)


def layers_of(network: Any) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in network.named_modules() if hasattr(layer, "set_processor")]


@torch.no_grad()
def run(network: Any, inputs: dict[str, Any]) -> Tensor:
    out = network(**inputs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


@EVERY
def test_one_tile_is_the_plain_network(family: str) -> None:
    network, inputs = make(family, NATIVE, NATIVE)
    plain = run(network, inputs)
    hook = install(network, tile=NATIVE)
    assert hook.layers
    same(run(network, inputs), plain)


@pytest.mark.parametrize("size", [(8, 12), (9, 13), (6, 7)])
@pytest.mark.parametrize("family", ["unet", "sdxl"])
def test_halo_of_the_canvas_is_the_plain_unet(family: str, size: tuple[int, int]) -> None:
    """Also at sizes that the stride-2 convolutions round up."""
    network, inputs = make(family, *size)
    plain = run(network, inputs)
    install(network, tile=4, halo=16)
    same(run(network, inputs), plain)


@NEIGHBOUR
def test_halo_of_the_canvas_with_the_networks_own_positions_is_plain(family: str) -> None:
    network, inputs = make(family, 12, 8)
    plain = run(network, inputs)
    install(network, tile=4, halo=16, native=(12, 8))
    same(run(network, inputs), plain)


@NEIGHBOUR
def test_a_small_halo_changes_the_result_and_remove_restores_it(family: str) -> None:
    network, inputs = make(family, 8, 12)
    layers = {name: layer.processor for name, layer in layers_of(network)}
    plain = run(network, inputs)
    hook = install(network, tile=4, halo=2)
    assert not torch.allclose(run(network, inputs), plain, atol=1e-3)
    now = {name: layer.processor for name, layer in layers_of(network)}
    assert {name for name in layers if now[name] is not layers[name]} == set(hook.layers)

    remove(network)
    assert all(layer.processor is layers[name] for name, layer in layers_of(network))
    assert torch.equal(run(network, inputs), plain)
    remove(network)  # nothing to do


@EVERY
def test_one_image_after_the_other_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = make(family, 8, 12)
    sizes: list[int] = []
    install(network, tile=4, halo=2)
    together = run(network, inputs)
    install(network, tile=4, halo=2, guidance_batch=False)
    forward = network.forward

    def counting(**kwargs: Any) -> Any:
        sizes.append(len(kwargs.get("sample", kwargs.get("hidden_states", kwargs.get("x")))))
        return forward(**kwargs)

    monkeypatch.setattr(network, "forward", counting)
    same(run(network, inputs), together)
    assert sizes == [1, 1]
    out = network(**inputs)
    assert type(out).__name__ in ("UNet2DConditionOutput", "Transformer2DModelOutput") and len(out.sample) == 2


def test_arguments_may_come_by_position() -> None:
    network, inputs = make("unet", 8, 8)
    install(network, tile=4)
    assert torch.equal(network(*inputs.values(), return_dict=False)[0], run(network, inputs))


def spy(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    op = ops.neighbor_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        calls.append({**kwargs, "q": q, "k": k, "v": v})
        return op(q, k, v, **kwargs)

    monkeypatch.setattr(processors.ops, "neighbor_attention", record)
    return calls


def test_windows_follow_the_resolution_of_each_level(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = make("unet", 13, 18, batch=1)
    calls = spy(monkeypatch)
    install(network, tile=(6, 5), halo=(3, 4), wrap=(False, True))
    run(network, inputs)
    seen = {(c["canvas"], c["tile"], c["halo"], c["wrap"]) for c in calls}
    assert seen == {
        ((13, 18), (6, 5), (3, 4), (False, True)),
        ((7, 9), (3, 3), (2, 2), (False, True)),
    }


@pytest.mark.parametrize("family", ["sd3", "pixart", "flux", "qwen", "z_image"])
def test_windows_of_transformers_are_in_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = make(family, 12, 16, batch=1)
    calls = spy(monkeypatch)
    install(network, tile=(8, 6), native=8)
    run(network, inputs)
    assert {(c["canvas"], c["tile"], c["halo"]) for c in calls} == {((6, 8), (4, 3), (2, 2))}
    # SD3's dual attention has no text, PixArt's text comes by cross-attention.
    with_text = [c.get("global_k") is not None for c in calls]
    assert any(with_text) == (family != "pixart") and all(with_text) == (family not in ("sd3", "pixart"))


@pytest.mark.parametrize("family", ["sd3", "pixart"])
@torch.no_grad()
def test_absolute_positions_are_those_of_the_native_size(family: str) -> None:
    network, _ = make(family, 8, 8)
    native = network.pos_embed(torch.zeros(1, 4, 8, 8)).unflatten(1, (4, 4))
    install(network, tile=8)
    canvas = network.pos_embed(torch.zeros(1, 4, 20, 14)).unflatten(1, (10, 7))
    assert native.flatten(1, 2).std(1).max() > 0.1
    for y in range(10):
        for x in range(7):
            assert torch.equal(canvas[:, y, x], native[:, y % 4, x % 4])
    remove(network)
    assert torch.equal(network.pos_embed(torch.zeros(1, 4, 8, 8)), native.flatten(1, 2))


def test_sd3_runs_beyond_its_largest_position() -> None:
    network, inputs = make("sd3", 16, 20)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        run(network, inputs)
    install(network, tile=8)
    assert run(network, inputs).std() > 1e-2


def test_sana_keeps_its_linear_attention() -> None:
    network, inputs = make("sana", 12, 16)
    plain = run(network, inputs)
    assert all(name.endswith("attn2") for name in install(network, tile=4).layers)  # attention to text alone
    assert torch.equal(run(network, inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["unet", "flux", "z_image"])
def test_low_precision_costs_what_it_costs_the_plain_network(family: str, dtype: torch.dtype) -> None:
    network, inputs = make(family, 8, 12)

    def low(value: Any) -> Any:
        if isinstance(value, list):
            return [low(v) for v in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    results = {}
    for precision in ("full", "low"):
        results["plain", precision] = run(network, inputs).float()
        install(network, tile=4, halo=2)
        results["canvas", precision] = run(network, inputs).float()
        remove(network)
        network.to(dtype)
        inputs = {name: value if name.endswith("ids") else low(value) for name, value in inputs.items()}
    plain, canvas = ((results[way, "low"] - results[way, "full"]).norm() for way in ("plain", "canvas"))
    assert 0 < canvas < 2 * plain


def test_errors_name_what_is_wrong() -> None:
    network, inputs = make("unet", 8, 8)
    with pytest.raises(TypeError, match="network=Linear: canvas mode knows UNet2DConditionModel"):
        install(torch.nn.Linear(2, 2), tile=4)
    assert around_of(network, CanvasAttention) is None
    install(network, tile=4)
    with pytest.raises(ValueError, match="attention_mask"):
        run(network, {**inputs, "attention_mask": torch.ones(2, 64)})
    with pytest.raises(ValueError, match="native"):
        install(build(sd3), tile=8, native=(7, 8))


def test_foreign_processors_are_refused_and_nothing_is_changed() -> None:
    network, _ = make("unet", 8, 8)
    layers = dict(layers_of(network))
    name = next(name for name in reversed(layers) if name.endswith("attn1"))
    foreign = IPAdapterAttnProcessor2_0(16, 16)
    layers[name].set_processor(foreign)
    before = {key: layer.processor for key, layer in layers.items()}
    with pytest.raises(TypeError, match=f"{name}: IPAdapterAttnProcessor2_0"):
        install(network, tile=4)
    assert all(layer.processor is before[key] for key, layer in layers.items())


def test_flux_grid_survives_positions_in_bfloat16() -> None:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(520.0), torch.arange(300.0)).bfloat16()
    hook = install(build(flux), tile=4)
    tokens = torch.zeros(1, 520 * 300, 1)
    assert hook._grid({"hidden_states": tokens, "img_ids": ids}) == ((520, 300), 2)


def test_reference_images_are_refused() -> None:
    network, inputs = make("flux", 8, 8)
    install(network, tile=4)
    ids = inputs["img_ids"]
    for reference in (ids, ids + torch.tensor([1, 0, 0])):
        both = {"img_ids": torch.cat([ids, reference]), "hidden_states": normal(2, 32, 16)}
        with pytest.raises(ValueError, match="img_ids"):
            run(network, inputs | both)
    network, inputs = make("qwen", 8, 8)
    install(network, tile=4)
    with pytest.raises(ValueError, match="img_shapes"):
        run(network, inputs | {"img_shapes": [[(1, 2, 2), (1, 4, 4)]] * 2})
    network, inputs = make("z_image", 8, 8)
    install(network, tile=4)
    with pytest.raises(ValueError, match=r"x: images of .* all must be .* one size"):
        run(network, inputs | {"x": [normal(4, 1, 8, 8), normal(4, 1, 8, 10)]})
