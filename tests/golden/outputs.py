"""Small outputs of every way through the engine, as SHA-256 of their pixels, to compare two commits.

``python tests/golden/outputs.py > a.txt`` at each commit, then ``diff``. The hashes hold for one machine and one
version of torch, so they are not stored. Run it from the root of the repository, in the project's environment.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DPMSolverMultistepScheduler  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import tiny_sd, tiny_sdxl  # noqa: E402
from tiny_transformers import tiny_sd3  # noqa: E402

from tiledcore import Motion, Region, TiledPipeline, TilingConfig, apply_tiling, remove_tiling  # noqa: E402
from tiledcore.cli.main import main  # noqa: E402
from tiledcore.loop.checkpoint import Checkpoint  # noqa: E402

torch.set_num_threads(1)
PROMPT = "relief map of a rugged coast"
EARTH: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
FLUX: dict[str, Any] = {
    "num_inference_steps": 4,
    "true_cfg_scale": 3.0,
    "negative_prompt": "",
    "max_sequence_length": 24,
}
MOVING = TilingConfig(tile=16, motion=Motion(blend_first=1, blend_last=1, fade=3))
RAMP = TilingConfig(tile=16, overlap=4)


def show(name: str, images: Any) -> None:
    pixels = np.concatenate([np.asarray(image) for image in images])
    print(f"{name:<22} {pixels.shape!s:<18} {hashlib.sha256(pixels.tobytes()).hexdigest()[:32]}", flush=True)


def run(pipe: Any, height: int, width: int, **kwargs: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    return pipe(PROMPT, height=height, width=width, generator=generator, **kwargs).images


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def embedded(folder: Path) -> None:
    earth, flux = TiledPipeline.from_pretrained("earth"), TiledPipeline.from_pretrained("earth-flux")
    for pipe in (earth, flux):
        pipe.set_progress_bar_config(disable=True)
    show("earth default", run(earth, 384, 512, **EARTH))
    show("earth moving", run(earth, 256, 384, tiling=MOVING, **EARTH))
    show("earth ramp", run(earth, 256, 384, tiling=RAMP, **EARTH))
    show("earth canvas", run(earth, 256, 384, tiling=TilingConfig(mode="canvas", tile=16), **EARTH))
    show("earth wrap x", run(earth, 256, 384, tiling=TilingConfig(tile=16, overlap=4, wrap=(False, True)), **EARTH))
    regions = [Region("satellite view of desert", box=(0, 0, 128, 256), feather=32)]
    show("earth regions", run(earth, 256, 384, tiling=RAMP, regions=regions, **EARTH))
    show("earth img2img", run(earth, 256, 384, image=picture(384, 256), strength=0.6, tiling=MOVING, **EARTH))
    show("earth preview", run(earth, 256, 256, tiling=RAMP, preview=folder / "preview.png", **EARTH))
    show("earth fused=False", run(TiledPipeline(earth.pipe, MOVING, fused=False), 256, 256, **EARTH))
    show("flux default", run(flux, 384, 512, **FLUX))
    show("flux canvas", run(flux, 384, 384, tiling=TilingConfig(mode="canvas", tile=16, halo=8), **FLUX))
    show("flux stages", run(flux, 512, 512, stages="auto", **FLUX))
    line = ["generate", PROMPT, "--size", "256x384", "--steps", "3", "--seed", "5", "--tile", "16", "--overlap", "4"]
    line += ["--dtype", "fp32"]
    main([*line, "--out", str(folder / "a.tif")])
    show("command tif", [Image.open(folder / "a.tif")])


class StopError(Exception):
    pass


def resumed(pipe: TiledPipeline, folder: Path) -> Any:
    """The same call, broken off, then run again."""
    calls = iter(range(1000))

    def stop(*_: Any) -> None:
        if next(calls) == 4:
            raise StopError

    handle = pipe.unet.register_forward_pre_hook(stop)
    try:
        run(pipe, 128, 192, num_inference_steps=5, checkpoint=Checkpoint(folder / "run", every=1))
        raise AssertionError("the call was to be broken off")
    except StopError:
        pass
    finally:
        handle.remove()
    images = run(pipe, 128, 192, num_inference_steps=5, checkpoint=folder / "run")
    assert pipe.report.resumed > 0
    return images


def tiny(folder: Path) -> None:
    torch.manual_seed(0)  # of the weights of tiny_sd3
    pipes = tiny_sd(), tiny_sdxl(), tiny_sd3()
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    sd, sdxl, sd3 = pipes
    small = TilingConfig(tile=8, overlap=2)
    plain = run(sd, 128, 192, num_inference_steps=3)
    show("sd plain", plain)
    apply_tiling(sd, TilingConfig(tile=8, motion=Motion(blend_first=0, blend_last=1, fade=0)))
    show("sd apply_tiling", run(sd, 128, 192, num_inference_steps=3))
    remove_tiling(sd)
    show("sd remove_tiling", run(sd, 128, 192, num_inference_steps=3))
    mask = Image.fromarray((np.arange(192) > 90).astype(np.uint8)[None].repeat(128, 0) * 255)
    tiled = TiledPipeline(sd, small)
    show("sd inpaint", run(tiled, 128, 192, image=picture(192, 128), mask_image=mask, num_inference_steps=4))
    show("sd resumed", resumed(tiled, folder))
    scheduler = sd.scheduler
    sd.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True)
    show("sd own scheduler step", run(tiled, 128, 192, num_inference_steps=4))
    sd.scheduler = scheduler
    show("sdxl tiles", run(TiledPipeline(sdxl, small), 128, 256, num_inference_steps=3))
    show("sd3 tiles", run(TiledPipeline(sd3, small), 128, 192, num_inference_steps=3))
    show("sd3 canvas", run(TiledPipeline(sd3, TilingConfig(mode="canvas", tile=8)), 128, 192, num_inference_steps=3))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        embedded(Path(temporary))
        tiny(Path(temporary))
