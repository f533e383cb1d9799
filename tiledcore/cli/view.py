"""The commands ``info`` and ``view``: print a picture's settings; show it, its tiles and regions in a browser.

A small server on this machine only sends the page and its tiles. Leaflet, the script that draws them, is installed with
the ``viewer`` extra; nothing comes from the internet, and the page's content security policy forbids it.
"""

import argparse
import io
import json
import re
import threading
import webbrowser
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from PIL import Image

from tiledcore.io.deepzoom import Levels
from tiledcore.io.images import read_metadata
from tiledcore.io.writers import TILE

ADDRESS = "127.0.0.1"
TILE_PATH = re.compile(r"/tiles/(\d{1,2})/(\d{1,7})/(\d{1,7})\.png")
# Refuses pages of other names that resolve to this address (DNS rebinding). Host names have no case.
HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
)
# No cache, because another picture may be at this address next time.
HEADERS = (("Cache-Control", "no-store"), ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff"))
# Not shown in the tables of settings.
SEPARATE = ("prompt", "negative_prompt", "regions", "tiling", "lines_y", "lines_x")


def view(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    leaflet = leaflet_files()
    metadata = read_metadata(args.file)
    with Levels(args.file) as levels:
        server = Server(levels, describe(args.file.name, levels, metadata), leaflet, args.port)
        width, height = levels.sizes[0]
        print(f"{args.file}: {width}x{height}\n{server.url} (Ctrl-C ends it)", flush=True)
        if not args.no_browser:  # in a thread, because a browser in the terminal returns when it is closed
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        with server, suppress(KeyboardInterrupt):
            server.serve_forever()


def info(args: argparse.Namespace) -> None:
    """Print the settings that are stored in a file."""
    metadata = read_metadata(args.file)
    if metadata is None:
        raise ValueError(f"{args.file}: holds no tiledcore settings (only PNG and TIFF files can)")
    if args.json:
        print(json.dumps(metadata, indent=2))
        return
    for key, value in (metadata | metadata.pop("tiling", {})).items():
        line = f"{key.replace('_', ' '):<18}{shown(value, key)}"
        # The file may come from anywhere: no control characters for the terminal.
        print("".join(c if c.isprintable() else " " for c in line))


def leaflet_files() -> dict[str, bytes]:
    """Leaflet's script and style sheet, from the ``viewer`` extra; a ValueError if it is not installed."""
    try:
        folder = files("xstatic.pkg.leaflet") / "data"
        return {name: (folder / name).read_bytes() for name in ("leaflet.js", "leaflet.css")}
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError("view: Leaflet is not installed: pip install tiledcore[viewer]") from error


def shown(value: Any, key: str = "") -> str:
    """One setting as text on one line; ``key`` is its name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "wrap" and isinstance(value, list):
        return "".join(axis for axis, on in zip("xy", value[::-1], strict=False) if on) or "no"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {shown(item, name)}" for name, item in value.items())
    if isinstance(value, list):
        return ("x" if key in ("size", "tile", "overlap", "halo") else " ").join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def describe(name: str, levels: Levels, metadata: dict[str, Any] | None) -> dict[str, Any]:
    """What view.html shows of a picture, as JSON.

    ``metadata`` is as ``generate`` stores it. The file may come from anywhere: what is not as expected is left out.
    """
    size = levels.sizes[0]
    page: dict[str, Any] = {"name": name, "sizes": levels.sizes, "tile": TILE, "note": None}
    page |= {"texts": [], "tables": [], "lines": {"x": [], "y": []}, "regions": []}
    if not metadata:
        return page | {"note": "This file holds no tiledcore settings: there are no tiles and regions to show."}
    tiling = metadata["tiling"] if isinstance(metadata.get("tiling"), dict) else {}
    texts = [key for key in ("prompt", "negative_prompt") if isinstance(metadata.get(key), str)]
    page["texts"] = [[key.replace("_", " "), metadata[key]] for key in texts]
    for title, settings in (("settings", metadata), ("tiling", tiling)):
        rows = [[key.replace("_", " "), shown(value, key)] for key, value in settings.items() if key not in SEPARATE]
        page["tables"].append([title, rows])
    if metadata.get("size") != list(size):
        return page | {"note": "The picture is not of the size that its settings name: tiles and regions are left out."}
    try:
        lines = {axis: _integers(tiling[f"lines_{axis}"]) for axis in "xy"}
        regions = [_region(region, size, tiling["wrap"]) for region in metadata.get("regions", [])]
    except (TypeError, ValueError, LookupError):
        return page | {"note": "The settings of this file are damaged: tiles and regions are left out."}
    return page | {"lines": lines, "regions": regions}


def _region(region: dict[str, Any], size: tuple[int, int], wrap: list[bool]) -> dict[str, Any]:
    areas = areas_of(_integers(region["box" if "box" in region else "bounds"]), size, wrap)
    details = [[key, shown(region[key], key)] for key in ("mask", "weight", "feather", "seed") if key in region]
    return {"prompt": shown(region["prompt"]), "mask": "mask" in region, "details": details, "areas": areas}


def areas_of(box: list[int], size: tuple[int, int], wrap: list[bool]) -> list[list[int]]:
    """A box as rectangles inside a picture of ``size`` (width, height): several where it crosses a wrapped border.

    Boxes are (left, top, right, bottom) in px; ``wrap`` is (y, x).
    """
    (left, top, right, bottom), (width, height) = box, size
    areas = [
        [max(left - x, 0), max(top - y, 0), min(right - x, width), min(bottom - y, height)]
        for y in (0, height)[: 1 + wrap[0]]
        for x in (0, width)[: 1 + wrap[1]]
    ]
    return [area for area in areas if area[0] < area[2] and area[1] < area[3]]


def _integers(value: list[int]) -> list[int]:
    """The list; a ValueError or TypeError if it is not one of integers that JavaScript can hold."""
    if not all(type(n) is int and abs(n) < 2**53 for n in value):
        raise ValueError(f"{value}: must be integers")
    return value


class Server(ThreadingHTTPServer):
    """Serves one picture, on the loopback interface only; ``port`` 0 is any that is free, an OSError if it is not."""

    daemon_threads = True

    def __init__(self, levels: Levels, page: dict[str, Any], leaflet: dict[str, bytes], port: int = 0) -> None:
        self.levels = levels
        html = (files("tiledcore.cli") / "view.html").read_bytes()
        # Everything but the tiles, by its path: no request is ever looked up in a folder.
        self.contents = {
            "/": ("text/html; charset=utf-8", html),
            "/picture.json": ("application/json", json.dumps(page).encode()),
            "/leaflet.js": ("text/javascript; charset=utf-8", leaflet["leaflet.js"]),
            "/leaflet.css": ("text/css; charset=utf-8", leaflet["leaflet.css"]),
        }
        super().__init__((ADDRESS, port), Handler)
        self.url = f"http://{ADDRESS}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a browser may be closed while it reads."""

    def answer(self, path: str, host: str) -> tuple[HTTPStatus, str, bytes]:
        """The status, type and content for a request of ``path`` with this ``Host`` header."""
        if HOST.fullmatch(host) is None:
            return HTTPStatus.FORBIDDEN, "text/plain", b"only as 127.0.0.1 or localhost\n"
        if path in self.contents:
            return HTTPStatus.OK, *self.contents[path]
        if (match := TILE_PATH.fullmatch(path)) is None:
            return HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n"
        try:
            pixels = self.levels.tile(*map(int, match.groups()))
        except IndexError as error:
            return HTTPStatus.NOT_FOUND, "text/plain", f"{error}\n".encode()
        except (OSError, ValueError) as error:
            return HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error}\n".encode()
        file = io.BytesIO()
        # Without loss, so that seams can be judged; compressed quickly, because it stays on this machine.
        Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
        return HTTPStatus.OK, "image/png", file.getvalue()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:  # the name that http.server looks for
        status, kind, content = self.server.answer(self.path.partition("?")[0], self.headers.get("Host", ""))
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(content))), *HEADERS):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: there is a request for every tile."""
