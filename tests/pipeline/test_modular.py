"""Modular pipelines of diffusers, and their guidance objects: ``apply_tiling`` on the pipeline, nothing else."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig
from tilings import RAMP
from tiny import tiny_sdxl
from tiny_transformers import build, tiny_flux

from tiledcore import Execution, TilingConfig, apply_tiling, remove_tiling

MID = LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks")
SCORES = LayerSkipConfig(indices=[0], fqn=MID.fqn, skip_attention=False, skip_attention_scores=True, skip_ff=False)
ALWAYS = {"start": 0.0, "stop": 1.0}


def modular(blocks: Any, parts: Any) -> Any:
    pipe = blocks.init_pipeline()
    known = pipe._component_specs
    pipe.update_components(
        **{name: part for name, part in parts.components.items() if part is not None and name in known}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl() -> Any:
    return modular(diffusers.StableDiffusionXLAutoBlocks(), tiny_sdxl())


def flux() -> Any:
    return modular(diffusers.FluxAutoBlocks(), build(tiny_flux))


def run(pipe: Any, size: tuple[int, int]) -> torch.Tensor:
    more = {"num_inference_steps": 2, "output_type": "latent", "output": "images"}
    return pipe(prompt="a cat", height=size[0], width=size[1], generator=torch.Generator().manual_seed(0), **more)


def check(pipe: Any) -> torch.Tensor:
    """One tile has the same bits, tile batches agree, and what is removed is gone."""
    plain, whole = run(pipe, (128, 128)), run(pipe, (176, 256))
    assert torch.equal(run(apply_tiling(pipe, RAMP), (128, 128)), plain)
    four = run(pipe, (176, 256))
    one = run(apply_tiling(pipe, RAMP, Execution(tile_batch=1)), (176, 256))
    torch.testing.assert_close(one, four, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(four, whole, atol=1e-2)
    assert torch.equal(run(remove_tiling(pipe), (128, 128)), plain)
    return four


def test_the_modular_sdxl_is_the_pipeline() -> None:
    pipe = tiny_sdxl()
    pipe.set_progress_bar_config(disable=True)
    more = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 7.5}
    apply_tiling(pipe, RAMP)
    own = pipe("a cat", height=176, width=256, generator=torch.Generator().manual_seed(0), **more).images
    torch.testing.assert_close(check(sdxl()), own, rtol=1e-3, atol=1e-4)


def test_the_modular_flux() -> None:
    check(flux())


def test_moving_tiles() -> None:
    assert run(apply_tiling(sdxl(), TilingConfig(tile=16, motion="moving")), (192, 256)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("AdaptiveProjectedGuidance", {"adaptive_projected_guidance_momentum": -0.5}),
        ("ClassifierFreeZeroStarGuidance", {}),
        ("TangentialClassifierFreeGuidance", {}),
        ("PerturbedAttentionGuidance", {"perturbed_guidance_config": SCORES}),
        ("SkipLayerGuidance", {"skip_layer_config": MID}),
        ("AutoGuidance", {"auto_guidance_config": MID}),
    ],
)
def test_guidance_objects(kind: str, settings: dict[str, Any]) -> None:
    words = {"PerturbedAttentionGuidance": "perturbed_guidance", "SkipLayerGuidance": "skip_layer_guidance"}
    when = {f"{words[kind]}_{name}": value for name, value in ALWAYS.items()} if kind in words else {}
    pipe, other = sdxl(), sdxl()
    pipe.update_components(guider=getattr(guiders, kind)(**settings, **when))
    assert not torch.allclose(check(pipe), run(apply_tiling(other, RAMP), (176, 256)), atol=1e-4)
