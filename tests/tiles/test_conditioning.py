"""Conditioning cut to tiles: the size of a tile batch changes no picture, and a tile sees its own part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionGLIGENPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
)
from tilings import RAMP, still
from tiny import TEXT_WIDTH, tiny_sd, tiny_sdxl, tiny_unet
from tiny_transformers import build, tiny_sd3

from tiledcore import Execution, apply_tiling
from tiledcore.tiles.conditioning import TileBatch, conditions, swap_major


def run(pipe: Any, tile_batch: int, tiling: Any = RAMP, **kwargs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    apply_tiling(pipe, tiling, Execution(tile_batch=tile_batch))
    call = {"height": 192, "width": 160, "num_inference_steps": 2, "output_type": "latent"} | kwargs
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images


def same_for_any_tile_batch(make: Any, **kwargs: Any) -> torch.Tensor:
    one, four = (run(make(), n, **kwargs) for n in (1, 4))
    torch.testing.assert_close(four, one, rtol=1e-3, atol=1e-4)
    return one


def pag(kind: Any, make: Any) -> Any:
    made = make()
    more = {"requires_safety_checker": False} if kind is StableDiffusionPAGPipeline else {"add_watermarker": False}
    return kind(**made.components, pag_applied_layers=["mid"], **more)


@pytest.mark.parametrize(
    ("kind", "make"), [(StableDiffusionPAGPipeline, tiny_sd), (StableDiffusionXLPAGPipeline, tiny_sdxl)]
)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_perturbed_attention_guidance(kind: Any, make: Any, guidance: float) -> None:
    perturbed = same_for_any_tile_batch(lambda: pag(kind, make), pag_scale=3.0, guidance_scale=guidance)
    plain = run(make(), 4, guidance_scale=guidance)
    assert not torch.allclose(perturbed, plain, atol=1e-2)


def test_skip_layer_guidance() -> None:
    arguments = {"skip_guidance_layers": [0], "skip_layer_guidance_scale": 2.8, "skip_layer_guidance_stop": 1.0}
    skipping = same_for_any_tile_batch(lambda: build(tiny_sd3), **arguments)
    assert not torch.allclose(skipping, run(build(tiny_sd3), 4), atol=1e-3)


def with_ip_adapter() -> Any:
    pipe = tiny_sd()
    random = torch.Generator().manual_seed(1)
    layers: dict[str, torch.Tensor] = {}
    for number, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn2.processor"):
            width = dict(pipe.unet.named_modules())[name.removesuffix(".processor")].inner_dim
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{part}.weight"] = torch.randn(width, TEXT_WIDTH, generator=random)
    projection = {
        "proj.weight": torch.randn(4 * TEXT_WIDTH, 8, generator=random),
        "proj.bias": torch.zeros(4 * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipe


def test_ip_adapter_and_its_masks() -> None:
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2))
    same_for_any_tile_batch(with_ip_adapter, ip_adapter_image_embeds=[embeds])
    tiling = still(tile=(12, 16), overlap=(0, 0))  # the upper half of the canvas, and the lower one
    results = []
    for rows in (slice(0, 192), slice(0, 96), slice(0, 0)):
        mask = torch.zeros(1, 1, 192, 128)
        mask[:, :, rows] = 1
        more = {"ip_adapter_image_embeds": [embeds], "cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
        results.append(run(with_ip_adapter(), 2, tiling, width=128, num_inference_steps=1, **more))
    everywhere, above, nowhere = results
    torch.testing.assert_close(above[:, :, :12], everywhere[:, :, :12], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(above[:, :, 12:], nowhere[:, :, 12:], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(everywhere, nowhere, atol=1e-2)


def gligen() -> Any:
    parts = {name: part for name, part in tiny_sd().components.items() if name != "image_encoder"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["unet"] = tiny_unet(cross_attention_dim=TEXT_WIDTH, attention_type="gated")
    for name, parameter in parts["unet"].named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            parameter.data.fill_(1.0)
    return StableDiffusionGLIGENPipeline(**parts, requires_safety_checker=False)


def test_gligen() -> None:
    more = {"gligen_phrases": ["a dog"], "gligen_scheduled_sampling_beta": 1.0}
    boxed = same_for_any_tile_batch(gligen, gligen_boxes=[[0.0, 0.0, 0.5, 0.4]], **more)
    other = run(gligen(), 4, gligen_boxes=[[0.5, 0.6, 1.0, 1.0]], **more)
    assert not torch.allclose(boxed, other, atol=1e-3)


def test_boxes_and_masks_of_a_tile() -> None:
    """A canvas of 8x16 in two tiles: the left half, and the right one."""
    offsets = torch.tensor([[0, 0], [0, 8]], dtype=torch.int32)
    boxes = torch.tensor([[[0.25, 0.0, 0.75, 0.5], [0.0, 0.5, 0.25, 1.0]]])
    given = {"gligen": {"boxes": boxes, "masks": torch.ones(1, 2), "positive_embeddings": torch.zeros(1, 2, 3)}}
    cut = conditions(given, TileBatch(offsets, (8, 8), (8, 16), 1, 8))["gligen"]
    assert cut["boxes"].tolist() == [
        [[0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0]],
        [[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]],
    ]
    assert cut["masks"].tolist() == [[1.0, 1.0], [1.0, 0.0]] and cut["positive_embeddings"].shape == (2, 2, 3)
    mask = torch.arange(32.0).expand(1, 1, 16, 32)  # twice the canvas' resolution; says where it comes from
    part = TileBatch(offsets, (8, 8), (8, 16), 2, 8)
    masks = conditions({"ip_adapter_masks": mask}, part)["ip_adapter_masks"]
    assert masks.shape == (4, 1, 16, 16)
    assert [masks[i, 0, 0].tolist() for i in range(2)] == [list(range(16)), list(range(16, 32))]


def test_swapping_twice_changes_nothing() -> None:
    rows = torch.arange(6)
    assert swap_major(rows, 3, 2).tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(swap_major(swap_major(rows, 3, 2), 2, 3), rows)
