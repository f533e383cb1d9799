"""Draw the pictures of how-it-works.md from the engine's own geometry: python docs/drawings.py."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import torch

from tiledcore import Motion, Staging, TileGrid, TilingConfig, ops
from tiledcore.compose.stages import plan_stages
from tiledcore.geometry import Tiling
from tiledcore.tiles.fade import fade_weights

FOLDER = Path(__file__).parent / "drawings"
COLOURS = ("#2a6fbb", "#c8553d", "#3d8b5f", "#8a5fa8")
GREY, LIGHT, OWN, HALO = "#666", "#e8e8e8", "#7fb0e0", "#c9dff4"
STEPS = (3, 4, 5, 6)


def rect(x: float, y: float, w: float, h: float, fill: str = "none", line: str = GREY, **more: object) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{line}"{_more(more)}/>'


def text(x: float, y: float, words: str, fill: str = "#333") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-family="sans-serif" font-size="13">{words}</text>'


def curve(points: Iterable[tuple[float, float]], line: str, **more: object) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{line}" stroke-width="2"{_more(more)}/>'


def _more(more: dict[str, object]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())


def svg(width: float, height: float, parts: Iterable[str]) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    white = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', white, *parts, "</svg>\n"])


def tiles() -> str:
    """Overlapping tiles of a canvas of 72 by 104, their cores, and the weights of a row of tiles."""
    grid, scale, top = TileGrid(72, 104, tile=40, overlap=8), 5, 30
    (h, w), parts = (
        grid.tile_size,
        [text(10, 20, "tiles overlap (dark); at the dashed lines the weights of two tiles are equal")],
    )
    for i, (y, x) in enumerate(grid.offsets):
        more = {"fill_opacity": 0.25, "stroke_width": 2}
        parts.append(
            rect(10 + scale * x, top + scale * y, scale * w, scale * h, COLOURS[i % 2], COLOURS[i % 2], **more)
        )
    for line in [start for start, _ in grid.cores[1]][1:]:
        x = 10 + scale * line
        parts.append(curve([(x, top), (x, top + scale * grid.height)], GREY, stroke_dasharray="4 4"))
    for line in [start for start, _ in grid.cores[0]][1:]:
        y = top + scale * line
        parts.append(curve([(10, y), (10 + scale * grid.width, y)], GREY, stroke_dasharray="4 4"))
    base = top + scale * grid.height + 100
    parts.append(text(10, base - 72, "weight of each tile along a row: the sum is 1 everywhere"))
    for i, (column, _) in enumerate(grid.cols):
        weights = weight(grid, i)
        points = [(10 + scale * (x + 0.5), base - 60 * weights[x]) for x in range(column, column + w)]
        parts.append(curve(points, COLOURS[i % 2]))
    return svg(20 + scale * grid.width, base + 10, parts)


def weight(grid: Tiling, column: int) -> list[float]:
    """The weight of a column of tiles along x: what blending makes of a tile of ones among tiles of zeros."""
    h, w = grid.tile_size
    ones = torch.tensor([float(i % len(grid.cols) == column) for i in range(len(grid))])
    values = ones.view(-1, 1, 1, 1).expand(-1, 1, h, w).contiguous()
    offsets = torch.tensor(grid.offsets, dtype=torch.int32)
    blended = ops.blend_tiles(values, offsets, (grid.height, grid.width), ramp=min(grid.overlap))
    return [round(value, 4) for value in blended[0, 0, 0].tolist()]


def partition(part: Tiling, x: float, y: float, scale: float) -> list[str]:
    """The tiles of one step."""
    places = [(row, column) for row in part.rows for column in part.cols]
    return [
        rect(x + scale * left, y + scale * top, scale * w, scale * h, COLOURS[i % 2], fill_opacity=0.25)
        for i, ((top, h), (left, w)) in enumerate(places)
    ]


def motion() -> str:
    """The tiles of four steps that follow one another."""
    grid, scale, parts = TileGrid(64, 96, tile=32), 2.0, []
    for i, step in enumerate(STEPS):
        left = 10 + i * (scale * grid.width + 14)
        parts += [text(left, 20, f"step {step}"), *partition(grid.shifted(step, seed=0), left, 30, scale)]
    return svg(20 + 4 * (scale * grid.width + 14) - 14, 40 + scale * grid.height, parts)


def fade() -> str:
    """How much of a prediction comes from the step before, along x, with the lines of both steps."""
    grid, scale, base = TileGrid(64, 96, tile=32), 7, 130
    before, now = (grid.shifted(step, seed=0) for step in STEPS[:2])
    weights = fade_weights(grid.width, [start for start, _ in now.cols], 6, wrap=False).tolist()
    parts = [text(10, 20, "weight of the step before"), rect(10, base - 80, scale * grid.width, 80, LIGHT, LIGHT)]
    for part, colour, dashes in ((before, GREY, "4 4"), (now, COLOURS[1], "none")):
        for start, _ in part.cols[1:]:
            x = 10 + scale * start
            parts.append(curve([(x, base - 90), (x, base)], colour, stroke_dasharray=dashes))
    parts.append(curve([(10 + scale * (x + 0.5), base - 80 * w) for x, w in enumerate(weights)], COLOURS[0]))
    parts += [
        text(10, base + 22, "lines of this step", COLOURS[1]),
        text(150, base + 22, "of the step before (dashed)"),
    ]
    return svg(20 + scale * grid.width, base + 34, parts)


def attention() -> str:
    """What two tokens of a canvas of 24 by 36 see, the second one over the border: where values of 1 arrive."""
    canvas, tile, halo, scale, parts = (24, 36), (8, 12), (4, 4), 9, []
    count = canvas[0] * canvas[1]
    still, values = torch.zeros(1, count, 1, count), torch.eye(count).view(1, count, 1, count)
    seen = ops.neighbor_attention(still, still, values, canvas=canvas, tile=tile, halo=halo, wrap=(False, True))
    for i, (token, words) in enumerate((((12, 18), "a token, its tile and the halo"), ((12, 2), "the same with wrap"))):
        left = 10 + i * (scale * canvas[1] + 24)
        parts += [text(left, 20, words), rect(left, 30, scale * canvas[1], scale * canvas[0], LIGHT)]
        row = (seen[0, token[0] * canvas[1] + token[1], 0] > 0).view(canvas).tolist()
        for y in range(canvas[0]):
            colours = [HALO if row[y][x] else None for x in range(canvas[1])]
            if y // tile[0] == token[0] // tile[0]:
                start = token[1] // tile[1] * tile[1]
                colours[start : start + tile[1]] = [OWN] * tile[1]
            if y == token[0]:
                colours[token[1]] = COLOURS[1]
            for colour, group in groupby(enumerate(colours), key=lambda pair: pair[1]):
                if colour is not None:
                    places = [x for x, _ in group]
                    at = (left + scale * places[0], 30 + scale * y)
                    parts.append(rect(*at, scale * len(places), scale, colour, colour))
        for y in range(0, canvas[0], tile[0]):
            for x in range(0, canvas[1], tile[1]):
                parts.append(rect(left + scale * x, 30 + scale * y, scale * tile[1], scale * tile[0]))
    return svg(2 * scale * canvas[1] + 44, 40 + scale * canvas[0], parts)


def stages() -> str:
    """The stages of 4096 by 4096 px from a model of 1024 by 1024 px, with their tiles."""
    parts, left, config = [], 10.0, TilingConfig(motion=Motion(blend_first=0, blend_last=0))
    for i, stage in enumerate(plan_stages((4096, 4096), (1024, 1024), 64, Staging())):
        side, grid = stage.width / 16, config.grid(stage.height // 8, stage.width // 8, native=128)
        said = "from noise" if stage.strength is None else f"refined, strength {stage.strength:g}"
        parts += [text(left, 20, f"{i + 1}: {stage.width}×{stage.height}"), text(left, 38, said)]
        parts += [
            rect(left + x / 2, 48 + y / 2, grid.tile_size[1] / 2, grid.tile_size[0] / 2, COLOURS[i], fill_opacity=0.25)
            for y, x in grid.offsets
        ]
        left += max(side, 140) + 20
    return svg(left - 10, 58 + 256, parts)


def drawings() -> dict[str, str]:
    """All of them, by name."""
    return {made.__name__: made() for made in (tiles, motion, fade, attention, stages)}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, drawing in drawings().items():
        (FOLDER / f"{name}.svg").write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
