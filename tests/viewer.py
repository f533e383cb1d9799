"""Pictures with settings, and the viewer's server of one in a thread of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tiledcore.cli.view import Server, describe, leaflet_files
from tiledcore.io.deepzoom import Levels
from tiledcore.io.images import read_metadata
from tiledcore.io.writers import write_rows

METADATA: dict[str, Any] = {
    "prompt": "a coast <b>from</b> above",
    "negative_prompt": "ice",
    "seed": 1234567,
    "model": "earth",
    "size": [700, 520],
    "stages": ["256x256, 8 steps", "700x520, 4 steps"],
    "regions": [
        {"prompt": "a <i>lake</i>", "box": [60, 40, 300, 260], "weight": 1.0, "feather": 32, "seed": 9},
        {"prompt": "desert", "box": [600, 300, 800, 460], "weight": 2.0, "feather": 16},
        {"prompt": "a forest", "mask": "forest.png", "bounds": [320, 300, 560, 500], "weight": 1.0, "feather": 32},
    ],
    "tiling": {"mode": "tiles", "tile": [32, 32], "wrap": [False, True], "lines_x": [256, 512], "lines_y": [256, 464]},
}


def pixels(width: int = 700, height: int = 520) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, (x * y) % 251], axis=-1).astype(np.uint8)


def saved(path: Path, metadata: dict[str, Any] | None = METADATA, image: np.ndarray | None = None) -> Path:
    image = pixels() if image is None else image
    if metadata is None:
        Image.fromarray(image).save(path)
    else:
        write_rows(path, (image.shape[1], image.shape[0]), [image], metadata)
    return path


@contextmanager
def serving(path: Path) -> Iterator[Server]:
    with Levels(path) as levels:
        server = Server(levels, describe(path.name, levels, read_metadata(path)), leaflet_files())
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
