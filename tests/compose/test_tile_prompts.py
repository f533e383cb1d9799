"""A prompt for each tile."""

from typing import Any

import pytest
import torch
from tilings import FADING, MOVING, RAMP, canvas_mode, still
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import build, tiny_flux, tiny_sd3

from tiledcore import Execution, Region, TiledPipeline, TilingConfig

HALVES = still(overlap=0)
"""Four tiles without overlap on the canvas of :func:`run`."""


def run(make: Any, tiling: TilingConfig = HALVES, execution: Execution | None = None, **kwargs: Any) -> torch.Tensor:
    pipe = TiledPipeline(make(), tiling, execution=execution, fused=kwargs.pop("fused", True))
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 256, "width": 256, "num_inference_steps": 1, "output_type": "latent"} | kwargs
    return pipe(call.pop("prompt", "a cat"), generator=torch.Generator().manual_seed(0), **call).images


def flux() -> Any:
    return build(tiny_flux)


MAKERS = [tiny_sd, tiny_sdxl, flux, lambda: build(tiny_sd3)]


@pytest.mark.parametrize("make", MAKERS, ids=["sd", "sdxl", "flux", "sd3"])
def test_each_tile_is_that_of_its_own_prompt(make: Any) -> None:
    texts = ["a dog", "ice", "a dog", None]
    whole = {text: run(make, prompt=text or "a cat") for text in texts}
    for execution in (Execution(tile_batch=4), Execution(tile_batch=3, guidance_batch=False)):
        made = run(make, prompt_for_tile=texts, execution=execution)
        for i, text in enumerate(texts):
            y, x = (16 * n for n in divmod(i, 2))
            own = whole[text][..., y : y + 16, x : x + 16] if made.ndim == 4 else None
            if own is not None:
                torch.testing.assert_close(made[..., y : y + 16, x : x + 16], own, rtol=1e-3, atol=1e-4)
                other = next(v for k, v in whole.items() if k != text)[..., y : y + 16, x : x + 16]
                assert not torch.allclose(own, other, atol=1e-3)
            else:  # tokens of 2x2, 16 of them along an axis
                cut = [
                    image.unflatten(1, (16, 16))[:, y // 2 : y // 2 + 8, x // 2 : x // 2 + 8]
                    for image in (made, whole[text])
                ]
                torch.testing.assert_close(*cut, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_sdxl, flux], ids=["sdxl", "flux"])
@pytest.mark.parametrize("tiling", [RAMP, MOVING, FADING, still(overlap=4, wrap=True)])
def test_a_function_that_gives_one_text_is_that_prompt_and_both_loops_agree(make: Any, tiling: TilingConfig) -> None:
    one = run(make, tiling, prompt="a dog", num_inference_steps=3)
    torch.testing.assert_close(
        run(make, tiling, prompt_for_tile=lambda box: "a dog", num_inference_steps=3), one, rtol=1e-4, atol=1e-4
    )
    halves = {"prompt_for_tile": lambda box: "a dog" if box[0] < 100 else "ice", "num_inference_steps": 3}
    both = [run(make, tiling, fused=fused, **halves) for fused in (True, False)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], one, atol=1e-2)


def test_each_text_is_encoded_once_in_batches() -> None:
    pipe = TiledPipeline(tiny_sd(), MOVING)
    encoded: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    texts = ["a dog", "ice"]
    boxes: list[Any] = []

    def prompt(box: tuple[int, int, int, int]) -> str:
        boxes.append(box)
        return texts[box[1] > 0]

    pipe("a cat", height=256, width=256, num_inference_steps=3, prompt_for_tile=prompt, output_type="latent")
    assert encoded == [1, 1, 2]  # prompt, negative prompt, all texts of the tiles of all steps
    assert len(boxes) == len(set(boxes)) and all(0 <= left < right <= 256 for left, _, right, _ in boxes)


def test_several_images_and_the_negative_branch_keep_theirs() -> None:
    made = run(tiny_sd, prompt=["a cat", "a coast"], prompt_for_tile=["a dog", None, None, None])
    plain = run(tiny_sd, prompt=["a cat", "a coast"])
    assert torch.allclose(made[:, :, 16:], plain[:, :, 16:], atol=1e-4)
    assert not torch.allclose(made[:, :, :16, :16], plain[:, :, :16, :16], atol=1e-3)
    true_cfg = {"true_cfg_scale": 2.0, "negative_prompt": "mist"}
    made = run(flux, prompt_for_tile=["a dog"] * 4, **true_cfg)
    torch.testing.assert_close(made, run(flux, prompt="a dog", **true_cfg), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tiling", "arguments", "message"),
    [
        (HALVES, {"prompt_for_tile": ["a dog"] * 3}, "3 prompts for 4 tiles, 2 rows of 2"),
        (MOVING, {"prompt_for_tile": ["a dog"] * 4}, "prompt_for_tile: a list .* these tiles move"),
        (HALVES, {"prompt_for_tile": lambda box: 5}, r"prompt_for_tile: gave 5 for the tile \(0, 0, 128, 128\) px"),
        (canvas_mode(), {"prompt_for_tile": lambda box: "ice"}, "prompt_for_tile: not with mode='canvas'"),
        (HALVES, {"prompt_for_tile": ["a"] * 4, "regions": [Region("b", (0, 0, 9, 9))]}, "prompt_for_tile, regions"),
        (HALVES, {"prompt_for_tile": lambda box: "ice", "checkpoint": "run"}, "checkpoint: cannot compare a function"),
        (HALVES, {"prompt_for_tile": ["a"] * 4, "stages": "auto"}, "prompt_for_tile: each stage has its own tiles"),
    ],
)
def test_what_prompts_of_tiles_cannot_be_is_named(tiling: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_sd, tiling, **arguments)
