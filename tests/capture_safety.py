"""Which pipelines wait for the GPU between steps, and which steps a CUDA graph can hold; written without a GPU.

    python tests/capture_safety.py > bench/results/capture_safety.md
    python tests/capture_safety.py [--json] [FAMILY ...]

Each pipeline makes five steps on a double of a GPU (:mod:`gpu_double`), once eagerly and once with graphs.
"""

import json
import sys
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import tiny
import tiny_controls
import tiny_transformers
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from gpu_double import Gpu, OnGpu, gpu, moved
from runs import Double, quiet
from tilings import canvas_mode, moving, still
from tiny_controls import hint
from torch.utils._pytree import tree_map_only

import tiledcore.call
from tiledcore import TiledPipeline
from tiledcore.loop.graph import Body
from tiledcore.tiles.denoiser import TileDenoiser

STEPS = 5
UNETS = ("sd", "sd_ancestral", "sdxl")
CONTROLLED = ("sd_control", "sd3_control", "flux_control", "qwen_control")
FAMILIES = (*UNETS, "sd3", "flux", "qwen", "pixart_sigma", "sana", "z_image", *CONTROLLED)
MODES = ("still", "moving", "canvas")


def source(family: str) -> Any:
    """The function that makes the pipeline which a transformer family is or stands on."""
    return getattr(tiny_transformers, f"tiny_{family.removesuffix('_control')}")


def pipeline(family: str) -> Any:
    """The pipeline on the GPU, and what it is called with there."""
    if family in UNETS:
        pipe = quiet(getattr(tiny, f"tiny_{family.partition('_')[0]}")())
        if family.endswith("ancestral"):
            pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        return moved(pipe)
    embeds = tiny_transformers.EMBEDS
    if family != "sd_control" and (make := source(family)) in embeds:
        embeds[make] = tree_map_only(torch.Tensor, lambda t: t if isinstance(t, OnGpu) else OnGpu(t), embeds[make])
    if family.endswith("control"):
        return moved(getattr(tiny_controls, f"control_{family.removesuffix('_control')}")())
    return moved(quiet(tiny_transformers.build(source(family))))


def run(wrapped: Any, family: str) -> Any:
    """Latents of a call on two tiles by three, or by two."""
    arguments: dict[str, Any] = {"num_inference_steps": STEPS}
    # SD 3's ControlNet has no positions for more in canvas mode.
    size = {"sana": (8, 12), "sd3_control": (24, 24)}.get(family, (24, 32))
    if family.endswith("control"):
        image = hint(size[0] * wrapped.vae_scale_factor, size[1] * wrapped.vae_scale_factor, [(255, 0, 0)])
        arguments["image" if family == "sd_control" else "control_image"] = image
    if family in UNETS or family == "sd_control":
        arguments |= {"height": 192, "width": 256, "generator": torch.Generator().manual_seed(0)}
        return wrapped("a cat", output_type="latent", **arguments).images
    return tiny_transformers.call(wrapped, source(family), size, **arguments)


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


def sampled(tiles: str, clipped: bool, mode: Gpu) -> dict[str, Any]:
    """:func:`tiledcore.sample` of a function of a tile; a scheduler that clips runs its own step."""
    scheduler = DDIMScheduler(clip_sample=clipped)
    scheduler.set_timesteps(STEPS)
    scheduler.timesteps = OnGpu(scheduler.timesteps)
    config = {"still": still, "moving": moving}[tiles]()
    mode.waits.clear()
    with watched(mode):
        tiledcore.sample(lambda x, t: x * 0.5, OnGpu(torch.randn(1, 4, 24, 32)), scheduler, config)
    waits = [[*key, n] for key, n in sorted(mode.waits.items())]
    found = {"family": "sample, clipped" if clipped else "sample", "mode": tiles, "waits": waits, "fused": not clipped}
    return found | {"captures": 0, "reason": None if clipped else "sample() has no graphs"}


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
        asked = [name for name in sys.argv[1:] if name != "--json"] or [*FAMILIES, "sample"]
        chosen = [family for family in FAMILIES if family in asked]
        rows = [row(family, tiles, mode) for family in chosen for tiles in MODES]
        rows += [sampled(tiles, clip, mode) for clip in (False, True) for tiles in MODES[:2] if "sample" in asked]
    print(json.dumps(rows) if "--json" in sys.argv else table(rows), end="")


if __name__ == "__main__":
    main()
