"""Make the pictures of the README and of these pages with the embedded model: make pictures.

Needs Chromium for the screenshots of the viewer. The sheets of samples in the models' cards are made by
``tiledcore.models.training.evaluate``, the drawings by ``docs/drawings.py``. Pictures that are
in ``build/pictures`` are not made again.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import tifffile
from PIL import Image

DOCS = Path(__file__).parent
MADE = DOCS.parent / "build" / "pictures"
sys.path.insert(0, str(DOCS.parent / "tests"))
from browser import Page, browser, find_browser  # noqa: E402
from viewer import serving  # noqa: E402

COMMANDS = {
    "world.tif": "'topographic map of a rugged coast' --size 4096x2048 --wrap x --stages auto --seed 3 --steps 8",
    "scene.tif": "'topographic map of a coast' --size 1024x1024 --regions docs/scene.toml --seed 3 --steps 12",
    "photo.png": "'satellite view of a coast' --init-image docs/mediterranean.jpg --size 4x --strength 0.2"
    " --motion still --overlap 8 --seed 0 --steps 20",
    "restyled.png": "'topographic map of a coast' --init-image docs/mediterranean.jpg --size 2x --strength 0.75"
    " --seed 0 --steps 12",
}
LOADED = (
    "document.querySelectorAll('img.leaflet-tile-loaded').length > 0 && "
    "!document.querySelector('img.leaflet-tile:not(.leaflet-tile-loaded)')"
)


def generate() -> None:
    """Run every command whose picture is not there yet."""
    MADE.mkdir(parents=True, exist_ok=True)
    for name, options in COMMANDS.items():
        if not (MADE / name).exists():
            command = [sys.executable, "-m", "tiledcore", "generate", *shlex.split(options), "--out", str(MADE / name)]
            subprocess.run(command, check=True, cwd=DOCS.parent)


def beside(*pictures: Image.Image, gap: int = 20) -> Image.Image:
    """Pictures of one height in a row on white."""
    row = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def small(name: str, width: int, height: int) -> Image.Image:
    file = MADE / name
    picture = Image.fromarray(tifffile.imread(file)) if file.suffix == ".tif" else Image.open(file)
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def save(picture: Image.Image, name: str, quality: int = 85) -> None:
    picture.convert("RGB").save(DOCS / name, quality=quality, optimize=True, progressive=True)
    print(f"docs/{name}: {picture.width}x{picture.height}, {(DOCS / name).stat().st_size // 1000} kB")


def screenshots(program: str) -> None:
    """The viewer's page with the world map, and with the prompt of a region."""
    shots = {
        "viewer": ("world.tif", (1400, 800), None),
        "viewer_region": ("scene.tif", (1424, 1056), "#regions button"),
    }
    for name, (file, size, click) in shots.items():
        with tempfile.TemporaryDirectory() as folder, browser(program, Path(folder), size) as page:
            shot = Path(folder) / "shot.png"
            with serving(MADE / file) as server:
                show(page, server.url, click)
                page.screenshot(shot)
            save(Image.open(shot), f"{name}.jpg")


def show(page: Page, url: str, click: str | None) -> None:
    page.open(url)
    page.wait(LOADED)
    if click:
        page.click_on(click)
        page.wait(LOADED)


def main() -> None:
    program = find_browser()
    if program is None:
        sys.exit("make pictures: no Chromium for the screenshots of the viewer: apt-get install chromium")
    generate()
    save(beside(small("../../demo-before.png", 810, 810), small("../../demo.png", 810, 810)), "demo.jpg")
    save(small("world.tif", 1600, 800), "world.jpg")
    save(small("scene.tif", 800, 800), "regions.jpg")
    box = (200, 75, 400, 275)  # of the photo, in px
    photo, large = Image.open(DOCS / "mediterranean.jpg").convert("RGB"), Image.open(MADE / "photo.png")
    part = large.crop(tuple(4 * side for side in box))
    save(beside(photo.crop(box).resize(part.size, Image.Resampling.BICUBIC), part), "photo.jpg")
    save(beside(photo.resize((700, 700), Image.Resampling.BICUBIC), small("restyled.png", 700, 700)), "restyled.jpg")
    screenshots(program)


if __name__ == "__main__":
    main()
