"""Pictures of every mode that Pillow opens become the right 8-bit RGB, or an error says why not."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiledcore.io.deepzoom import Levels
from tiledcore.io.images import MOST_PIXELS, PictureError, load_image, read_metadata, to_rgb

GREY = (0, 1, 127, 128, 254, 255)


def grey(values: Any, dtype: Any) -> Image.Image:
    return Image.fromarray(np.array([values], dtype))


def row(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image)[0].tolist()]


SIXTEEN = [257 * value for value in GREY]


@pytest.mark.parametrize(
    "image",
    [
        grey(GREY, np.uint8),
        grey(SIXTEEN, np.uint16),
        grey(SIXTEEN, np.int32),
        grey([value / 255 for value in GREY], np.float32),
        grey(GREY, np.uint8).convert("LA"),
        grey(GREY, np.uint8).convert("P"),
        grey(GREY, np.uint8).convert("RGBA"),
        grey(GREY, np.uint8).convert("RGBA").convert("RGBa"),
        grey(GREY, np.uint8).convert("YCbCr"),
        grey(GREY, np.uint8).convert("RGB").convert("HSV"),
        grey(GREY, np.uint8).convert("RGB").convert("CMYK"),
        grey(GREY, np.uint8).convert("RGB").convert("RGBX"),
    ],
    ids=lambda image: image.mode,
)
def test_greys(image: Image.Image, caplog: pytest.LogCaptureFixture) -> None:
    assert row(to_rgb(image)) == [(value,) * 3 for value in GREY]
    assert caplog.records == []


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_files_of_16_bits(tmp_path: Path, name: str) -> None:
    """Dark ones, too: their scale does not depend on what is in them."""
    grey([0, 128, 129, 256, 386, 600], np.uint16).save(tmp_path / name)
    assert row(load_image(tmp_path / name)) == [(value,) * 3 for value in (0, 0, 1, 1, 2, 2)]


def test_big_endian_16_bits() -> None:
    data = np.array([SIXTEEN], ">u2").tobytes()
    assert row(to_rgb(Image.frombytes("I;16B", (6, 1), data))) == [(value,) * 3 for value in GREY]


def test_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert row(to_rgb(image)) == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["LAB", "La"])
def test_colours_that_pillow_does_not_convert(mode: str) -> None:
    with pytest.raises(PictureError, match=f"image: has colours of mode {mode}; convert it to RGB first"):
        to_rgb(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBa", "PNG"])
def test_transparent_pixels_are_white_and_said_once(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Left: hidden by alpha 0. Middle: opaque. Right: half of it."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(90, 90, 90, 0), (90, 90, 90, 255), (90, 90, 90, 128)])
    expected = [255, 90, 172]
    if mode in ("LA", "RGBa"):
        image = image.convert(mode)
    if mode in ("P", "PNG"):  # one colour of these is transparent
        image = Image.new("P" if mode == "P" else "L", (3, 1))
        image.putdata([0, 90, 172])
        if mode == "P":
            image.putpalette([n for value in range(256) for n in (value,) * 3])
        image.save(tmp_path / "a.png", transparency=0)
        image = Image.open(tmp_path / "a.png")
    pixels = row(to_rgb(image, "a.png"))
    assert np.abs(np.array(pixels) - np.array(expected)[:, None]).max() <= 1
    assert [record.message for record in caplog.records] == ["a.png: has transparent pixels, which are drawn on white"]


def test_an_opaque_alpha_is_no_matter(caplog: pytest.LogCaptureFixture) -> None:
    assert row(to_rgb(Image.new("RGBA", (1, 1), (1, 2, 3, 255)))) == [(1, 2, 3)]
    assert row(to_rgb(Image.new("LA", (1, 1), (1, 255)))) == [(1, 1, 1)] and caplog.records == []


@pytest.mark.parametrize(
    "values",
    [[-1, 4], [0, 255], [0, 70000], [0.0, 255.0], [0.0, np.nan], [-0.5, 0.5], [0.0, 256.0], [0.0, np.inf]],
    ids=str,
)
def test_no_known_white(values: list[float], tmp_path: Path) -> None:
    image = grey(values, np.int32 if isinstance(values[0], int) else np.float32)
    with pytest.raises(PictureError, match=r"^image: has values from .* to .*; convert it to 8 or 16 bits a channel"):
        to_rgb(image)
    image.save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match=r"a\.tif: has values from"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("sixteen", [False, True])
def test_exif_rotation(tmp_path: Path, sixteen: bool) -> None:
    image = grey([0, 257 * 90, 257 * 180], np.uint16) if sixteen else Image.new("RGB", (3, 1), (5, 6, 7))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    found = load_image(tmp_path / "a.png")
    expected = [(0, 0, 0), (90, 90, 90), (180, 180, 180)] if sixteen else [(5, 6, 7)] * 3
    assert found.size == (1, 3)
    assert [tuple(pixel) for pixel in np.asarray(found)[:, 0].tolist()] == expected


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_the_first_frame_of_an_animation(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert row(load_image(tmp_path / name))[0] == (255 if name != "a.webp" else pytest.approx(255, abs=2), 0, 0)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / name}: has several frames; the first one is used"
    ]


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_picture_that_declares_more_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(200_000, 200_000))
    assert MOST_PIXELS == 32768**2
    for read in (load_image, Levels):
        with pytest.raises(PictureError, match=r"a\.png: is 200000x200000 px; pictures are read up to 1,073,741,824"):
            read(path)
    assert read_metadata(path) is None  # reads the header alone
    path.write_bytes(png_header(32768, 32769))
    with pytest.raises(PictureError, match="32768x32769"):
        load_image(path)
    path.write_bytes(png_header(16384, 16384))  # Pillow's own limit is a quarter of this
    with pytest.raises(PictureError, match=r"a\.png: cannot be read: not an image"):
        load_image(path)


@pytest.mark.parametrize("read", [load_image, read_metadata])
def test_only_ordinary_files_are_read(read: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(PictureError, match="Is a device or a pipe, not an ordinary file"):
            read(path)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    read(tmp_path / "link.png")
