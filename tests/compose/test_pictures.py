"""Pictures as tensors; the colours of one given to another; inpainting through the same call."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from tilings import RAMP
from tiny import tiny_sd

from tiledcore import TiledPipeline
from tiledcore.compose.pictures import match_colour, size_px, to_tensor


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_form_is_the_same_tensor() -> None:
    array = (noise(5, 7, 3) * 255).numpy().astype(np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
    for form in (Image.fromarray(array), [Image.fromarray(array)], array, array[None], array / 255, expected[0]):
        torch.testing.assert_close(to_tensor(form), expected)
    assert to_tensor([Image.fromarray(array)] * 2).shape == (2, 3, 5, 7)
    assert to_tensor(Image.new("L", (4, 6))).shape == (1, 3, 6, 4)


@pytest.mark.parametrize("wrong", [3, [], torch.zeros(1, 4, 8, 8), torch.zeros(8, 8), ["a.png"]])
def test_what_is_no_picture(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"image=.*must be RGB"):
        to_tensor(wrong)


def test_colours_of_one_and_details_of_the_other() -> None:
    detail = 0.1 * (noise(1, 3, 96, 128, seed=1) - 0.5) + 0.4
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 128), indexing="ij")
    source = 0.2 + 0.6 * torch.stack([x, y, (x + y) / 2])[None]
    matched = match_colour(detail, source)

    def smooth(image: torch.Tensor) -> np.ndarray:
        return gaussian_filter(image.numpy(), (0, 0, 8, 8), mode="reflect")

    assert np.abs(smooth(matched) - smooth(source)).max() < 0.04 < np.abs(smooth(detail) - smooth(source)).max()
    for image in (matched, detail):  # what is left is the same detail
        image -= torch.from_numpy(smooth(image))
    assert float((matched - detail).abs().mean()) < 0.3 * float(detail.abs().mean())


def test_colours_are_matched_in_the_form_that_came() -> None:
    source = noise(1, 3, 16, 16)
    pictures = [Image.effect_noise((64, 48), 50).convert("RGB") for _ in range(2)]
    (out, second), array = match_colour(pictures, source), match_colour(np.full((1, 48, 64, 3), 0.5), source)
    assert isinstance(out, Image.Image) and out.size == second.size == (64, 48)
    assert isinstance(array, np.ndarray) and array.shape == (1, 48, 64, 3)
    torch.testing.assert_close(match_colour(source, source), source)


def tiny() -> TiledPipeline:
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    return TiledPipeline.from_pipe(pipe, tiling=RAMP)


def run(pipe: TiledPipeline, image: Any, **kwargs: Any) -> Any:
    arguments: dict[str, Any] = {"num_inference_steps": 2, "strength": 1.0, "output_type": "pt"}
    return pipe("a", image=image, generator=torch.Generator().manual_seed(0), **(arguments | kwargs)).images


def test_keep_colour_in_a_call() -> None:
    image = torch.tensor([0.9, 0.5, 0.1]).view(1, 3, 1, 1).expand(1, 3, 160, 256).contiguous()
    plain, kept = (run(tiny(), image, keep_colour=keep) for keep in (False, True))
    aim = torch.tensor([0.9, 0.5, 0.1])
    off, kept_off = ((x.float().mean((0, 2, 3)) - aim).abs().max() for x in (plain, kept))
    assert kept_off < 0.02 < off
    with pytest.raises(ValueError, match="keep_colour: needs an image"):
        tiny()("a", height=128, width=128, keep_colour=True)
    with pytest.raises(ValueError, match="output_type='latent'"):
        run(tiny(), image, keep_colour=True, output_type="latent")


@pytest.mark.parametrize("form", ["pil", "tensor"])
def test_inpainting_changes_only_the_mask(form: str) -> None:
    picture = Image.effect_noise((256, 160), 60).convert("RGB")
    mask = Image.new("L", picture.size)
    mask.paste(255, (128, 0, 256, 160))
    image = picture if form == "pil" else to_tensor(picture)
    pipe = tiny()
    painted = run(pipe, image, mask_image=mask, output_type="latent")
    assert pipe.report is not None and not pipe.report.fused  # it has a loop of its own
    other = run(pipe, image, mask_image=mask, output_type="latent", guidance_scale=1.0)
    assert painted.shape == (1, 4, 20, 32)
    assert torch.equal(painted[..., :16], other[..., :16])
    assert not torch.allclose(painted[..., 16:], other[..., 16:])
    with pytest.raises(ValueError, match="mask_image: needs an image"):
        tiny()("a", mask_image=mask)


def test_the_size_of_what_a_pipeline_starts_from() -> None:
    assert size_px(Image.new("RGB", (40, 24)), 8) == (24, 40)
    assert size_px(torch.zeros(2, 3, 24, 40), 8) == size_px(torch.zeros(3, 24, 40), 8) == (24, 40)
    assert size_px(torch.zeros(1, 4, 3, 5), 8) == size_px(torch.zeros(1, 16, 3, 5), 8) == (24, 40)
    assert size_px(None, 8) is None
