"""Which pipelines wait for the GPU between steps, and which steps a CUDA graph can hold; written without a GPU.

    python tests/capture_safety.py > bench/results/capture_safety.md
    python tests/capture_safety.py --json [FAMILY ...]

Each pipeline makes five steps on a double of a GPU (:mod:`gpu_double`), once eagerly and once with graphs.
"""

import json
import sys
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import tiny
import tiny_transformers
import torch
from diffusers import EulerAncestralDiscreteScheduler
from gpu_double import Gpu, OnGpu, gpu, moved
from runs import Double, quiet
from tilings import canvas_mode, moving, still
from torch.utils._pytree import tree_map_only

import tiledcore.call
from tiledcore import TiledPipeline
from tiledcore.loop.graph import Body
from tiledcore.tiles.denoiser import TileDenoiser

STEPS = 5
FAMILIES = ("sd", "sd_ancestral", "sdxl", "sd3", "flux", "pixart_sigma", "sana", "z_image")
MODES = ("still", "moving", "canvas")


def pipeline(family: str) -> Any:
    """The pipeline on the GPU, and what it is called with there."""
    if family.startswith("sd") and family != "sd3":
        pipe = quiet(getattr(tiny, f"tiny_{family.partition('_')[0]}")())
        if family.endswith("ancestral"):
            pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        return moved(pipe)
    make = getattr(tiny_transformers, f"tiny_{family}")
    embeds = tiny_transformers.EMBEDS
    if make in embeds:
        embeds[make] = tree_map_only(torch.Tensor, lambda t: t if isinstance(t, OnGpu) else OnGpu(t), embeds[make])
    return moved(quiet(tiny_transformers.build(make)))


def run(wrapped: Any, family: str) -> Any:
    """Latents of a call on two tiles by three."""
    if family.startswith("sd") and family != "sd3":
        arguments: dict[str, Any] = {"height": 192, "width": 256, "generator": torch.Generator().manual_seed(0)}
        return wrapped("a cat", num_inference_steps=STEPS, output_type="latent", **arguments).images
    make = getattr(tiny_transformers, f"tiny_{family}")
    size = (8, 12) if family == "sana" else (24, 32)
    return tiny_transformers.call(wrapped, make, size, num_inference_steps=STEPS)


class Recorder(Double):
    """Graphs of the double: while a step is captured, whatever waits is an error."""

    def __init__(self, mode: Gpu) -> None:
        super().__init__()
        self.mode = mode

    def capture(self, body: Body) -> Body:
        self.mode.capturing = True
        try:
            body()
        except RuntimeError as error:
            self.broken = str(error)
            raise
        finally:
            self.mode.capturing = False
        fresh = True

        def replay() -> None:  # the first one is what the capture has done already
            nonlocal fresh
            if not fresh:
                body()
            fresh = False

        self.replays.add(replay)
        return replay


def watched(mode: Gpu) -> Any:
    """The host is watched from the end of the second evaluation to the end of the last but one."""
    attempt, done = TileDenoiser.attempt, 0

    def watching(self: TileDenoiser, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = attempt(self, *args, **kwargs)
        done += 1
        mode.watching = 2 <= done < STEPS - 1
        return result

    return patch.object(TileDenoiser, "attempt", watching)


def row(family: str, tiles: str, mode: Gpu) -> dict[str, Any]:
    """One family in one mode."""
    side: dict[str, Any] = {"tile": 4} if family == "sana" else {}
    config = {"still": still, "moving": moving, "canvas": canvas_mode}[tiles](**side)
    wrapped = TiledPipeline.from_pipe(pipeline(family), tiling=config, cuda_graph=False)
    mode.waits.clear()
    with watched(mode):
        run(wrapped, family)
    found = {"family": family, "mode": tiles, "waits": [[*key, n] for key, n in sorted(mode.waits.items())]}
    wrapped._graphs.mode, wrapped._graphs.backend = "auto", Recorder(mode)
    run(wrapped, family)
    graph = wrapped.report.graph
    return found | {"fused": wrapped.report.fused, "captures": graph.captures, "reason": graph.reason}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# What waits for the GPU between steps, and what a CUDA graph can hold",
        "",
        "Written by `python tests/capture_safety.py`: five steps of tiny pipelines on a double of a GPU.",
        "Waits are reads of a tensor by the host, and copies of pageable memory, in the third and fourth.",
        "",
        "| family | mode | loop | waits of tiledcore | of diffusers | CUDA graph |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        waits = {who: sum(w[3] for w in row["waits"] if w[0] == who) for who in ("tiledcore", "diffusers")}
        graph = "captured" if row["captures"] else row["reason"] or "the pipeline's own loop"
        loop = "fused" if row["fused"] else "own"
        lines.append(f"| {' | '.join(map(str, (row['family'], row['mode'], loop, *waits.values(), graph)))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with gpu() as mode, patch.object(tiledcore.call, "current_device", lambda _: nullcontext()):
        chosen = [family for family in FAMILIES if not sys.argv[2:] or family in sys.argv[2:]]
        rows = [row(family, tiles, mode) for family in chosen for tiles in MODES]
    print(json.dumps(rows) if "--json" in sys.argv else table(rows), end="")


if __name__ == "__main__":
    main()
