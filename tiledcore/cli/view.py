"""The commands ``info`` and ``view``: print a picture's settings; show it, its tiles and regions in a browser.

A small server on this machine only sends the page and its tiles. Leaflet, the script that draws them, is installed with
the ``viewer`` extra; nothing comes from the internet, and the page's content security policy forbids it.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import threading
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from PIL import Image

from tiledcore.cli.console import CommandError
from tiledcore.cli.request import reading
from tiledcore.io.deepzoom import Levels
from tiledcore.io.images import read_metadata, readable
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
    with reading(args.file):
        metadata, levels = read_metadata(args.file), Levels(args.file)
    with levels:
        try:
            server = Server(levels, describe(args.file.name, levels, metadata), leaflet, args.port)
        except OSError as error:
            raise CommandError(f"--port {args.port}: {error.strerror or error}") from error
        width, height = levels.sizes[0]
        settings = "" if metadata else ", without tiledcore settings: no tiles or regions to show"
        print(f"{args.file}: {width}x{height}{settings}", flush=True)
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        if not args.no_browser:  # in a thread, because a browser in the terminal returns when it is closed
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()


def info(args: argparse.Namespace) -> None:
    """Print the settings that are stored in a file."""
    with reading(args.file):
        metadata = read_metadata(args.file)
    if metadata is None:
        raise CommandError(f"{args.file}: holds no tiledcore settings (only PNG and TIFF files can)")
    if args.json:
        print(json.dumps(metadata, indent=2))
        return
    for key, value in (metadata | metadata.pop("tiling", {})).items():
        line = f"{key.replace('_', ' '):<18}{readable(key, value)}"
        # The file may come from anywhere: no control characters for the terminal.
        print("".join(c if c.isprintable() else " " for c in line))


def leaflet_files() -> dict[str, bytes]:
    """Leaflet's script and style sheet, from the ``viewer`` extra; a CommandError if it is not installed."""
    try:
        folder = files("xstatic.pkg.leaflet") / "data"
        return {name: (folder / name).read_bytes() for name in ("leaflet.js", "leaflet.css")}
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise CommandError("view: Leaflet is not installed: pip install tiledcore[viewer]") from error


def describe(name: str, levels: Levels, metadata: dict[str, Any] | None) -> dict[str, Any]:
    """What view.html shows of a picture, as JSON: areas are (left, top, right, bottom) in px.

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
        rows = [[k.replace("_", " "), readable(k, v)] for k, v in settings.items() if k not in SEPARATE]
        page["tables"].append([title, rows])
    if metadata.get("size") != list(size):
        return page | {"note": "The picture is not of the size that its settings name: tiles and regions are left out."}
    page["lines"] = {axis: _integers(tiling.get(f"lines_{axis}")) for axis in "xy"}
    regions = metadata.get("regions")
    for region in regions if isinstance(regions, list) else []:
        if isinstance(region, dict) and isinstance(region.get("prompt"), str):
            box = _integers(region.get("box", region.get("bounds")))
            keys = [key for key in ("mask", "weight", "feather", "seed") if key in region]
            details = [[key, readable(key, region[key])] for key in keys]
            areas = areas_of(box, size, tiling.get("wrap")) if len(box) == 4 else []
            found = {"prompt": region["prompt"], "mask": "mask" in region, "details": details, "areas": areas}
            page["regions"].append(found)
    return page


def areas_of(box: list[int], size: tuple[int, int], wrap: Any) -> list[list[int]]:
    """A box as rectangles inside a picture of ``size`` (width, height): several where it crosses a wrapped border.

    Boxes are (left, top, right, bottom); ``wrap`` is two bools (y, x), anything else is none.
    """

    def parts(low: int, high: int, length: int, axis: int) -> list[tuple[int, int]]:
        found = [(max(low, 0), min(high, length))]
        if isinstance(wrap, list) and wrap[axis : axis + 1] == [True]:
            found.append((0, min(high - length, length)))
        return [(start, stop) for start, stop in found if start < stop]

    left, top, right, bottom = box
    rows, columns = parts(top, bottom, size[1], 0), parts(left, right, size[0], 1)
    return [[x0, y0, x1, y1] for y0, y1 in rows for x0, x1 in columns]


def _integers(value: Any) -> list[int]:
    """The list, or an empty one if it is not a list of integers that JavaScript can hold."""
    valid = isinstance(value, list) and all(type(n) is int and abs(n) < 2**53 for n in value)
    return value if valid else []


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
