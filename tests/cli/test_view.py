"""The viewer: its tiles against the picture itself, what its page is told, its server over HTTP, its command."""

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from viewer import METADATA, pixels, saved, serving

from tiledcore.cli import view
from tiledcore.cli.main import main
from tiledcore.cli.view import Server, areas_of, describe, leaflet_files
from tiledcore.io.deepzoom import Levels
from tiledcore.io.images import read_metadata


def halved(image: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels; at odd ends the last ones count twice."""
    image = np.pad(image, [(0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)], mode="edge").astype(float)
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


def get(server: Server, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes, Any]:
    """As it is: no client that tidies the path up first."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest(method, path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, answer.headers


# ----------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("name", ["a.tiff", "a.png"])
@pytest.mark.parametrize("size", [(700, 520), (256, 256), (257, 3), (1, 1), (1025, 511)])
def test_tiles_are_the_picture_at_every_level(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    expected = pixels(*size).astype(float)
    with Levels(saved(tmp_path / name, METADATA, pixels(*size))) as levels:
        assert bool(levels.pages) == (name == "a.tiff")
        for level, (width, height) in enumerate(levels.sizes):
            assert (height, width) == expected.shape[:2]
            rows, columns = -(-height // 256), -(-width // 256)
            whole = np.concatenate(
                [np.concatenate([levels.tile(level, x, y) for x in range(columns)], axis=1) for y in range(rows)]
            )
            # Rounded at every level on the way, by at most a half each time.
            assert whole.shape == expected.shape and abs(whole - expected).max() <= 0.5 * level
            expected = halved(expected)
        assert max(levels.sizes[-1]) <= 256 and (len(levels.sizes) == 1 or max(levels.sizes[-2]) > 256)


def test_tiles_that_are_not_there(tmp_path: Path) -> None:
    with Levels(saved(tmp_path / "a.tif")) as levels:
        for at in ((0, 3, 0), (0, 0, 3), (3, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 0, -1)):
            with pytest.raises(IndexError):
                levels.tile(*at)


MEASURE = """
import resource, sys
from pathlib import Path
from tiledcore.io.deepzoom import Levels
import tifffile
with Levels(Path(sys.argv[1])) as levels:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for level, (width, height) in enumerate(levels.sizes):
        for y in range(-(-height // 256)):
            for x in range(-(-width // 256)):
                levels.tile(level, x, y)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_pyramid_is_never_read_whole(tmp_path: Path) -> None:
    """Every tile of a picture of 27 MB, whose file is as large for it is noise."""
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), np.uint8)
    path = saved(tmp_path / "a.tif", METADATA, noise)
    assert path.stat().st_size > 26e6
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 10e6


def test_other_tiffs_are_decoded_once(tmp_path: Path) -> None:
    image = Image.fromarray(pixels())
    image.save(tmp_path / "strips.tif", compression="tiff_lzw")
    image.convert("L").save(tmp_path / "grey.tif")
    for name, expected in (("strips.tif", image), ("grey.tif", image.convert("L").convert("RGB"))):
        with Levels(tmp_path / name) as levels:
            assert not levels.pages
            assert np.array_equal(levels.tile(0, 1, 1), np.asarray(expected)[256:512, 256:512])


def test_a_damaged_tile_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif")
    with Levels(path) as levels:
        start, count = (getattr(levels.pages[0], name)[4] for name in ("dataoffsets", "databytecounts"))
    data = bytearray(path.read_bytes())
    data[start : start + count] = bytes(count)
    path.write_bytes(data)
    with serving(path) as server:
        assert get(server, "/tiles/0/0/0.png")[0] == 200
        status, content, _ = get(server, "/tiles/0/1/1.png")
        assert status == 500 and content.startswith(b"tile (1, 1) of level 0: ")


# ----------------------------------------------------------------------------- what the page is told


def test_the_page_is_told_what_the_settings_say(tmp_path: Path) -> None:
    with Levels(saved(tmp_path / "a.png")) as levels:
        page = describe("a.png", levels, read_metadata(tmp_path / "a.png"))
    assert page["sizes"] == [(700, 520), (350, 260), (175, 130)]
    assert page["texts"] == [["prompt", "a coast <b>from</b> above"], ["negative prompt", "ice"]]
    assert page["lines"] == {"x": [256, 512], "y": [256, 464]}
    assert page["note"] is None
    tables = {title: dict(rows) for title, rows in page["tables"]}
    assert tables["settings"]["seed"] == "1234567" and "regions" not in tables["settings"]
    assert tables["tiling"] == {"mode": "tiles", "tile": "32x32", "wrap": "x"}
    assert [region["areas"] for region in page["regions"]] == [
        [[60, 40, 300, 260]],
        [[600, 300, 700, 460], [0, 300, 100, 460]],  # goes on at the other side
        [[320, 300, 560, 500]],
    ]
    assert [region["mask"] for region in page["regions"]] == [False, False, True]
    assert page["regions"][0]["details"] == [["weight", "1.0"], ["feather", "32"], ["seed", "9"]]


def test_areas_around_a_torus() -> None:
    assert areas_of([90, 40, 110, 60], (100, 50), [True, True]) == [
        [90, 40, 100, 50],
        [0, 40, 10, 50],
        [90, 0, 100, 10],
        [0, 0, 10, 10],
    ]
    assert areas_of([90, 40, 110, 60], (100, 50), [False, False]) == [[90, 40, 100, 50]]
    assert areas_of([200, 40, 210, 60], (100, 50), [False, False]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"regions": "none"},
        {"regions": [1, None, {"box": [1, 2, 3, 4]}, {"prompt": 3}]},
        {"regions": [{"prompt": "x", "box": ["0", 0, 8, 8]}, {"prompt": "y", "box": [1, 2]}, {"prompt": "z"}]},
        {"tiling": [1]},
        {"tiling": {"lines_x": [True, 1.5, "2"], "lines_y": 3, "wrap": 7}},
        {"tiling": {"lines_x": [float("nan")], "wrap": [1]}, "seed": float("inf")},
        {"tiling": METADATA["tiling"] | {"wrap": 7}},
        {"prompt": 5, "negative_prompt": []},
        {"size": None},
    ],
)
def test_settings_that_are_anyones(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with Levels(saved(tmp_path / "a.png", None)) as levels:
        page = describe("a.png", levels, METADATA | wrong)
    text = json.dumps(page, allow_nan=False)  # as a browser reads it
    assert all(area for region in json.loads(text)["regions"] for area in region["areas"])
    assert len(page["regions"]) <= 3


def test_a_picture_of_another_size_has_no_overlay(tmp_path: Path) -> None:
    with Levels(saved(tmp_path / "a.png", METADATA, pixels(300, 200))) as levels:
        page = describe("a.png", levels, METADATA)
    assert page["regions"] == [] and page["lines"] == {"x": [], "y": []}
    assert "not of the size" in page["note"] and page["texts"]


# ----------------------------------------------------------------------------- HTTP


def test_the_server_serves_the_page_and_the_tiles(tmp_path: Path) -> None:
    with serving(saved(tmp_path / "a.tif")) as server:
        status, html, headers = get(server, "/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
        assert not re.findall(rb"https?://", html)  # nothing from anywhere else
        assert b"L.CRS.Simple" in html
        assert get(server, "/leaflet.js")[1] == leaflet_files()["leaflet.js"]
        assert get(server, "/leaflet.css")[2]["Content-Type"] == "text/css; charset=utf-8"
        assert json.loads(get(server, "/picture.json")[1])["sizes"][0] == [700, 520]
        status, content, headers = get(server, "/tiles/0/2/1.png?again")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        with Image.open(io.BytesIO(content)) as tile:
            assert np.array_equal(np.asarray(tile), pixels()[256:512, 512:])


def test_tiles_at_the_same_time(tmp_path: Path) -> None:
    """Threads that seek in one file."""
    wrong: list[Any] = []
    with serving(saved(tmp_path / "a.tif")) as server:

        def fetch(x: int, y: int) -> None:
            for _ in range(5):
                with Image.open(io.BytesIO(get(server, f"/tiles/0/{x}/{y}.png")[1])) as tile:
                    expected = pixels()[256 * y : 256 * y + 256, 256 * x : 256 * x + 256]
                    if not np.array_equal(np.asarray(tile), expected):
                        wrong.append((x, y))

        threads = [threading.Thread(target=fetch, args=(x, y)) for x in range(3) for y in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/view.html",
        "/view.py",
        "/tiles/0/9/0.png",
        "/tiles/9/0/0.png",
        "/tiles/0/-1/0.png",
        "/tiles/0/0/../../../a.png",
        "/tiles/0/0/0.png/",
        "/tiles/0/0/99999999999.png",
        "http://example.org/",
        "/leaflet.js/..",
    ],
)
def test_nothing_else_is_served(tmp_path: Path, path: str) -> None:
    saved(tmp_path / "b.png")
    with serving(saved(tmp_path / "a.tif")) as server:
        assert get(server, path, "127.0.0.1")[0] == 404


def test_only_this_machine(tmp_path: Path) -> None:
    with serving(saved(tmp_path / "a.png")) as server:
        port = server.server_address[1]
        assert server.server_address[0] == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{port}/"
        for host in ("127.0.0.1", f"127.0.0.1:{port}", f"localhost:{port}"):
            assert get(server, "/picture.json", host)[0] == 200
        # A page elsewhere whose name resolves to this address, or no name at all.
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", ""):
            assert get(server, "/picture.json", host)[0] == 403
        assert get(server, "/", method="POST")[0] == 501
        # The other addresses of this machine do not answer.
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=2):
            pass


# ----------------------------------------------------------------------------- the command


def error(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("tiledcore: error: ")
    return line.removeprefix("tiledcore: error: ")


def test_bad_input_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(view.webbrowser, "open", lambda url: pytest.fail("a browser was opened"))
    Path("text.png").write_text("nothing")
    Path("short.tif").write_bytes(saved(Path("a.tif")).read_bytes()[:50])
    for name, message in (
        ("none.tif", "none.tif: cannot be read: No such file or directory"),
        ("text.png", "text.png: cannot be read: not an image"),
        ("short.tif", "short.tif: cannot be read: not an image"),
        (".", ".: cannot be read: Is a directory"),
    ):
        assert main(["view", name]) == 2
        assert error(capsys) == message
    assert main(["view", "a.tif", "--port", "70000"]) == 2
    assert "'70000' is not an integer from 0 to 65535" in error(capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["view", "a.tif", "--port", str(port)]) == 2
        assert "Address already in use" in error(capsys)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    saved(tmp_path / "a.tif")
    for name in [name for name in sys.modules if name.split(".")[0] == "xstatic"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "xstatic", None)
    assert main(["view", str(tmp_path / "a.tif")]) == 2
    assert error(capsys) == "view: Leaflet is not installed: pip install tiledcore[viewer]"


@pytest.mark.parametrize("metadata", [METADATA, None])
def test_it_serves_until_it_is_interrupted(tmp_path: Path, metadata: dict[str, Any] | None) -> None:
    path = saved(tmp_path / "a.png", metadata)
    command = [sys.executable, "-m", "tiledcore", "view", str(path), "--no-browser"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs ignore SIGINT, and what they start inherits that.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, preexec_fn=default, **pipes) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            first, second = process.stdout.readline(), process.stdout.readline()
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", second)
            assert found is not None
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
            connection.request("GET", "/picture.json")
            assert (json.loads(connection.getresponse().read())["note"] is None) == (
                metadata is not None
            ) and "700x520" in first
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_it_opens_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    opened: list[str] = []
    shown = threading.Event()
    monkeypatch.setattr(view.webbrowser, "open", lambda url: (opened.append(url), shown.set()))

    def interrupted(self: Server) -> None:
        assert shown.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    assert main(["view", str(saved(tmp_path / "a.png"))]) == 0
    assert opened[0] in capsys.readouterr().out
