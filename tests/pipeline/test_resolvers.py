"""Size and picture of a call, for any size and form: the image has a size that the model can make."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_sd
from tiny_transformers import build, tiny_flux

from tiledcore.call import _with_size, size_unit
from tiledcore.cli.model import check_size
from tiledcore.compose.pictures import resized, size_px

PIPES = [tiny_sd(), build(tiny_flux)]
FORMS = ("PIL", "L", "I;16", "RGBA", "list", "array", "arrays", "tensor", "tensors")
sides = st.integers(1, 90)


def picture(form: str, height: int, width: int, seed: int) -> Any:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if form == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    if form in ("L", "RGBA"):
        return image.convert(form)
    if form == "list":
        return [image, image]
    if form in ("array", "arrays"):
        return pixels if form == "array" else pixels[None].astype(np.float32) / 255
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    return {"PIL": image, "tensor": tensor, "tensors": tensor[None]}[form]


@examples(30, 200)
@given(st.sampled_from(FORMS), sides, sides, sides, sides, st.integers(0, 99))
def test_a_resized_picture_keeps_its_form_and_range(
    form: str, height: int, width: int, tall: int, wide: int, seed: int
) -> None:
    image = picture(form, height, width, seed)
    assert size_px(image, 8) == (height, width)
    made = resized(image, (tall, wide), 8)
    assert size_px(made, 8) == (tall, wide)
    assert isinstance(made, Image.Image) == isinstance(image, Image.Image)
    one, new = (x[0] if isinstance(x, list) else x for x in (image, made))
    if isinstance(new, Image.Image):
        assert new.mode == "RGB"
        return
    assert new.dtype == one.dtype and new.ndim == one.ndim
    low, high = float(one.min()), float(one.max())
    assert low - 1e-4 <= float(new.min()) and float(new.max()) <= high + 1e-4


@examples(30, 200)
@given(
    st.sampled_from(PIPES),
    st.sampled_from(FORMS),
    st.integers(16, 400),
    st.integers(16, 400),
    st.booleans(),
    st.booleans(),
)
def test_the_size_of_a_call_is_settled_once(
    pipe: Any, form: str, height: int, width: int, gives_height: bool, gives_width: bool
) -> None:
    unit = size_unit(pipe)
    arguments: dict[str, Any] = {"image": picture(form, height, width, 0)}
    arguments |= {"height": 8 * unit} if gives_height else {}
    arguments |= {"width": 6 * unit} if gives_width else {}
    tall = 8 * unit if gives_height else max(unit, height // unit * unit)
    wide = 6 * unit if gives_width else max(unit, width // unit * unit)
    assert _with_size(pipe, arguments) == (tall, wide)
    assert size_px(arguments["image"], pipe.vae_scale_factor) == (tall, wide)
    assert (arguments["height"], arguments["width"]) == (tall, wide)


@examples(30, 200)
@given(st.sampled_from(PIPES), st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_command_refuses_other_sizes_and_names_the_nearest(pipe: Any, width: int, height: int) -> None:
    unit = size_unit(pipe)
    fits = width % unit == 0 and height % unit == 0
    try:
        check_size((width, height), unit)
    except Exception as error:
        assert not fits
        below = [max(unit, side // unit * unit) for side in (width, height)]
        assert f"{below[0]}x{below[1]}" in str(error)
    else:
        assert fits
