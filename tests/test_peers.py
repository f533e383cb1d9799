"""The peers against what their papers say of them, with an ideal network and with the engine itself."""

from typing import Any

import pytest
import torch
from tiny import tiny_sd
from torch import Tensor

from bench.peers import methods
from bench.peers.methods import Model, counted
from bench.peers.scalediff import guided, low, neighborhood_patch_attention, patch_attention, scalediff
from bench.windows import average, cut, starts
from tiledcore import TiledPipeline, TilingConfig

STEPS = 3


@pytest.fixture(scope="module")
def model() -> Model:
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        return Model(pipe, "a map", STEPS, 3.0)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))


def tiled(model: Model, noise: Tensor, **tiling: Any) -> Tensor:
    pipe = TiledPipeline.from_pipe(model.pipe, tiling=TilingConfig(**tiling))
    side = 8 * noise.shape[-1]
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    result: Tensor = pipe("a map", height=side, width=side, **call).images
    return result


@pytest.mark.parametrize(
    ("name", "tiling"),
    [("dense", {"tile": 32}), ("multidiffusion", {"overlap": 8, "window": "mean"})],
)
def test_the_engine_gives_the_same_latents_where_the_method_is_the_same(
    model: Model, noise: Tensor, name: str, tiling: dict[str, Any]
) -> None:
    options = {"stride": 8} if name == "multidiffusion" else {}
    with torch.inference_mode():
        found = getattr(methods, name)(model, noise, **options)
        expected = tiled(model, noise, **tiling)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_multidiffusion_without_overlap_is_each_window_alone(model: Model, noise: Tensor) -> None:
    with torch.inference_mode():
        found = methods.multidiffusion(model, noise, stride=16)
        corner = methods.dense(model, noise[:, :, 16:, :16])
    torch.testing.assert_close(found[:, :, 16:, :16], corner, atol=1e-4, rtol=1e-4)


def test_counts_are_those_of_the_geometry(model: Model, noise: Tensor) -> None:
    """Windows a step: 4 without overlap, 9 at half strides, 81 at an eighth; two branches; batches of 4."""
    expected = {
        "dense": (1024, 1),
        "spotdiffusion": (4 * 256, 1),
        "mixture_of_diffusers": (9 * 256, 3),
        "multidiffusion": (81 * 256, 21),
        # the first phase is one window; the second has 9 local windows and 4 dilated ones
        "demofusion": (256 + 9 * 256 + 4 * 256, 1 + 3 + 1),
    }
    for name, (pixels, evaluations) in expected.items():
        with torch.inference_mode(), counted(model.pipe.unet) as spent:
            result = getattr(methods, name)(model, noise)
        assert result.shape == noise.shape and bool(result.isfinite().all())
        assert (sum(spent), len(spent)) == (2 * STEPS * pixels, STEPS * evaluations), name
    with torch.inference_mode(), counted(model.pipe.unet) as spent:
        tiled(model, noise, overlap=0)
    assert sum(spent) == 2 * STEPS * 1024


class Linear(Model):
    """A network that predicts each pixel by itself: then no way of tiling can change the result."""

    def predict(self, windows: Tensor, t: Tensor) -> Tensor:
        return 0.3 * windows

    def __init__(self, model: Model) -> None:
        self.__dict__.update(model.__dict__)


@pytest.mark.parametrize("name", ["multidiffusion", "mixture_of_diffusers", "spotdiffusion"])
def test_a_network_without_context_cannot_tell_windows_from_the_canvas(model: Model, noise: Tensor, name: str) -> None:
    plain = Linear(model)
    torch.testing.assert_close(getattr(methods, name)(plain, noise), methods.dense(plain, noise), atol=1e-5, rtol=1e-4)


def test_demofusion_keeps_the_composition_of_its_first_phase(model: Model, noise: Tensor) -> None:
    """With a network that always finds the same image of zeros, the skip residual is all that is left of the first."""
    plain = Linear(model)
    found = methods.demofusion(plain, noise)
    other = methods.demofusion(plain, torch.cat([noise[:, :, :16], -noise[:, :, 16:]], 2))
    assert found.shape == noise.shape
    assert not torch.allclose(found, other)
    small = methods.dense(plain, noise[:, :, :16, :16])
    shrunk = torch.nn.functional.avg_pool2d(found, 2)
    correlation = torch.corrcoef(torch.stack([shrunk.flatten(), small.flatten()]))[0, 1]
    assert correlation > 0.5


def test_window_helpers() -> None:
    assert starts(32, 16, 8) == [0, 8, 16] and starts(30, 16, 8) == [0, 8, 14] and starts(8, 16, 8) == [0]
    canvas = torch.arange(64.0).view(1, 1, 8, 8)
    corners = [(0, 0), (0, 4), (3, 2), (4, 0), (4, 4)]
    weight = torch.rand(4, 4) + 0.1
    torch.testing.assert_close(average(cut(canvas, corners, 4), corners, canvas, weight), canvas)


def test_scalediff_attends_to_windows_of_native_size(model: Model, noise: Tensor) -> None:
    """On a canvas of native size it is the network's own attention; on a larger one, far tokens are apart."""
    unet, text = model.pipe.unet, model.text[:1]
    with torch.inference_mode():
        small = noise[:, :, :16, :16]
        plain = unet(small, 500, encoder_hidden_states=text).sample
        with patch_attention(unet, 16):
            torch.testing.assert_close(unet(small, 500, encoder_hidden_states=text).sample, plain, atol=1e-4, rtol=1e-3)
        attention = next(m for name, m in unet.named_modules() if name.endswith("attn1"))
        tokens = torch.randn(1, 1024, attention.to_q.in_features, generator=torch.Generator().manual_seed(0))
        found = neighborhood_patch_attention(16, 32, attention, tokens)
        moved = neighborhood_patch_attention(16, 32, attention, torch.cat([tokens[:, :-1], tokens[:, -1:] + 1], 1))
    changed = (found != moved).any(-1).view(32, 32)
    # The last token is only in the window of the last patch of queries, 8 by 8.
    assert bool(changed[24:, 24:].all()) and int(changed.sum()) == 64


def test_structure_guidance_moves_the_clean_latents_to_the_guide(model: Model, noise: Tensor) -> None:
    t, guide = torch.tensor(900), torch.ones_like(noise)
    power = model.pipe.scheduler.alphas_cumprod[900]
    prediction = guided(model, noise, noise, t, guide)
    clean = (noise - (1 - power).sqrt() * prediction) / power.sqrt()
    before = (noise - (1 - power).sqrt() * noise) / power.sqrt()
    expected = before + 0.9 * (low(guide, 16) - low(before, 16))
    torch.testing.assert_close(clean, expected, atol=1e-4, rtol=1e-4)


def test_what_a_method_cannot_do_is_refused(model: Model, noise: Tensor) -> None:
    with pytest.raises(ValueError, match="no multiple of the window, 16"):
        methods.spotdiffusion(model, noise[..., :24])
    with pytest.raises(ValueError, match="must be square"):
        methods.demofusion(model, noise[..., :16])
    with pytest.raises(ValueError, match="must be 16 times a power of two"):
        scalediff(model, torch.zeros(1, 4, 48, 48))
