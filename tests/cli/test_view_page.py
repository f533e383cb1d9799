"""The viewer's page in a real browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, browser, find_browser
from PIL import Image
from viewer import METADATA, pixels, saved, serving

from tiledcore.io.deepzoom import Levels

LOADED = (
    "document.querySelectorAll('img.leaflet-tile-loaded').length > 0 && "
    "!document.querySelector('img.leaflet-tile:not(.leaflet-tile-loaded)')"
)
PROGRAM = find_browser()
pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@needs_browser
@pytest.mark.parametrize("name", ["a.tiff", "a.png"])
def test_the_page_draws_the_picture(page: Page, tmp_path: Path, name: str) -> None:
    with serving(saved(tmp_path / name, METADATA)) as server:
        page.open(server.url)
        page.wait(LOADED)
        page.click_on("#actual")
        page.wait("document.querySelector('#place').textContent.startsWith('100 %')")
        page.run("document.querySelectorAll('.tools input').forEach((box) => box.checked && box.click())")
        page.wait(LOADED)
        # Where the picture is on the screen: the border of its first tile.
        find = "(({x, y}) => [x, y])(document.querySelector(`img[src*='/tiles/0/0/0.png']`).getBoundingClientRect())"
        left, top = page.wait(f"document.querySelector(`img[src*='/tiles/0/0/0.png']`) && {find}")
        assert left == int(left) and top == int(top)
        page.screenshot(tmp_path / "shot.png")
        shown = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
        left, top = int(left), int(top)
        # Of 700x520 px, less what lies under the readout and the buttons at the left of the stage.
        part = shown[top + 100 : top + 400, left + 100 : left + 600]
        assert abs(part - pixels()[100:400, 100:600]).max() <= 1
        assert not [url for url in page.requested if not url.startswith((server.url, "data:"))]


@needs_browser
def test_the_page_shows_no_seams_of_its_own(page: Page, tmp_path: Path) -> None:
    flat = np.full((2000, 2000, 3), 200, np.uint8)
    with serving(saved(tmp_path / "a.tif", None, flat)) as server:
        page.open(server.url)
        seen = []
        for _ in range(4):
            page.wait(LOADED)
            page.screenshot(tmp_path / "shot.png")
            stage = np.asarray(Image.open(tmp_path / "shot.png").convert("L"))[280:580, 260:660]
            assert stage.min() == stage.max() == 200
            seen.append(int(page.run("document.querySelector('#place').textContent").split(" ")[0]))
            page.click_on(".leaflet-control-zoom-in")
        assert seen == [25, 50, 100, 200]


@needs_browser
def test_regions_answer_with_their_prompts(page: Page, tmp_path: Path) -> None:
    with serving(saved(tmp_path / "a.tif")) as server:
        page.open(server.url)
        page.wait(LOADED)
        assert page.run("document.querySelectorAll('path.region').length") == 4
        page.click_on("path.region")
        page.wait("document.querySelector('.leaflet-popup-content')")
        popup = page.run("document.querySelector('.leaflet-popup-content').innerText")
        assert popup.splitlines()[0] == "a <i>lake</i>" and "seed\t9" in popup
        assert page.run("document.querySelector('#regions .chosen').innerText").endswith("a <i>lake</i>")
        # From the list: the region comes into view.
        page.click_on("#regions button:nth-of-type(3)")
        page.wait("document.querySelector('.leaflet-popup-content').innerText.startsWith('a forest')")
        assert "box around the mask" in page.run("document.querySelector('.leaflet-popup-content').innerText")
        page.wait(LOADED)
        assert int(page.run("document.querySelector('#place').textContent").split(" ")[0]) > 100


@needs_browser
def test_the_panel_and_what_can_be_hidden(page: Page, tmp_path: Path) -> None:
    with serving(saved(tmp_path / "a.tif")) as server:
        page.open(server.url)
        page.wait(LOADED)
        text = page.run("document.querySelector('aside').innerText")
        for expected in ("a.tif", "700 × 520 px", "a coast <b>from</b> above", "1234567", "32x32", "desert"):
            assert expected in text
        assert page.run("document.querySelectorAll('aside b, aside i').length") == 0
        for box, selector in (("#show-grid", "path.grid"), ("#show-regions", "path.region")):
            count = f"document.querySelectorAll('{selector}').length"
            shown = page.run(count)
            assert shown > 0
            page.click_on(box)
            assert page.run(count) == 0
            page.click_on(box)
            assert page.run(count) == shown


@needs_browser
def test_a_picture_without_settings(page: Page, tmp_path: Path) -> None:
    with serving(saved(tmp_path / "a.jpg", None)) as server:
        page.open(server.url)
        page.wait(LOADED)
        assert "no tiledcore settings" in page.run("document.querySelector('#note').textContent")
        assert page.run("document.querySelectorAll('.tools input:disabled').length") == 2


@needs_browser
def test_a_damaged_file_says_so(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: Levels, *at: int) -> Any:
        raise ValueError("damaged")

    monkeypatch.setattr(Levels, "tile", damaged)
    with serving(saved(tmp_path / "a.tif")) as server:
        page.open(server.url)
        page.wait(
            "document.querySelector('#note').textContent === 'Some tiles could not be read: the file is damaged.'"
        )
