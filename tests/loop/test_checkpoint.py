"""Runs that are broken off go on to the same bits; a file that is damaged or of another run is refused."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from runs import Killed, assert_same_after, broken_off, killed_at
from runs import resumable as run
from tilings import CANVAS, MOVING, still
from tiny import tiny_sd, tiny_sdxl
from tiny_transformers import NATIVE, build, call, tiny_flux, tiny_pixart_sigma, tiny_sd3
from torch import Tensor

from tiledcore import Execution, TiledPipeline, TilingConfig
from tiledcore.cli.main import main
from tiledcore.loop.checkpoint import FILE, Checkpoint, load, settings_of


def with_scheduler(name: str) -> Any:
    def make() -> Any:
        pipe = tiny_sd()
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        return pipe

    return make


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"],
)
@pytest.mark.parametrize("evaluation", [1, 3])
def test_every_kind_of_scheduler(scheduler: str, evaluation: int, tmp_path: Path) -> None:
    assert_same_after(evaluation, with_scheduler(scheduler), tmp_path / "run")


@pytest.mark.parametrize(
    "tiling",
    [MOVING, CANVAS, still(wrap=True)],
    ids=["moving", "canvas", "wrap"],
)
def test_every_way_over_the_canvas(tiling: TilingConfig, tmp_path: Path) -> None:
    assert_same_after(2, tiny_sdxl, tmp_path, tiling=tiling)


def test_image_to_image_and_several_generators(tmp_path: Path) -> None:
    start = Image.effect_noise((200, 128), 60).convert("RGB")
    assert_same_after(1, tiny_sd, tmp_path / "a", image=start, strength=0.6)
    generators = [[torch.Generator().manual_seed(i) for i in (3, 4)] for _ in range(3)]
    make, kwargs = with_scheduler("EulerAncestralDiscreteScheduler"), {"num_images_per_prompt": 2}
    whole, _ = run(make(), generator=generators[0], **kwargs)
    broken_off(3, make, generator=generators[1], checkpoint=tmp_path / "b", **kwargs)
    resumed, _ = run(make(), generator=generators[2], checkpoint=tmp_path / "b", **kwargs)
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_transformers(make: Any, tmp_path: Path) -> None:
    def go(**kwargs: Any) -> Tensor:
        wrapped = TiledPipeline.from_pipe(build(make), tiling=still(tile=NATIVE, overlap=4))
        result: Tensor = call(wrapped, make, (24, 32), num_inference_steps=3, **kwargs)
        return result

    whole = go()
    with pytest.MonkeyPatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(Killed):
            go(checkpoint=tmp_path)
    assert torch.equal(go(checkpoint=tmp_path), whole)


def test_a_finished_run_is_only_decoded_again(tmp_path: Path) -> None:
    first, _ = run(tiny_sd(), checkpoint=tmp_path)
    again, report = run(tiny_sd(), checkpoint=tmp_path)
    assert torch.equal(again, first)
    assert (report.evaluations, report.resumed, report.fused) == (0, 4, True)
    Checkpoint(tmp_path).remove()
    assert not tmp_path.exists()


def test_saved_every_few_evaluations(tmp_path: Path) -> None:
    broken_off(3, tiny_sd, checkpoint=Checkpoint(tmp_path, every=2))
    saved = load(Checkpoint(tmp_path))
    assert saved is not None
    assert (saved.index, saved.steps, saved.seeds) == (2, 4, [0])
    assert os.listdir(tmp_path) == [FILE]
    run(tiny_sd(), checkpoint=Checkpoint(tmp_path, every=3))
    saved = load(Checkpoint(tmp_path))
    assert saved is not None and saved.index == 4


def test_memory_settings_may_change(tmp_path: Path) -> None:
    whole, _ = run(tiny_sd())
    broken_off(2, tiny_sd, checkpoint=tmp_path)
    resumed, report = run(tiny_sd(), execution=Execution(tile_batch=1), checkpoint=tmp_path)
    assert report.resumed == 2
    torch.testing.assert_close(resumed, whole)


# ----------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("saved")
    broken_off(2, tiny_sd, checkpoint=folder)
    return (folder / FILE).read_bytes()


def test_damaged_files(file: bytes, tmp_path: Path) -> None:
    length = len(file)
    damaged = [file[:n] for n in (0, 7, 32, 33, length // 2, length - 1)]
    damaged += [file + b"x", bytes(length), b"not a checkpoint"]
    for place in (0, 31, 32, length // 2, length - 1):
        damaged.append(file[:place] + bytes([file[place] ^ 1]) + file[place + 1 :])
    path = tmp_path / FILE
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint: .* is damaged \(.*remove it to start over"):
            load(Checkpoint(tmp_path))
        assert path.read_bytes() == content
        assert os.listdir(tmp_path) == [FILE]
    with pytest.raises(ValueError, match="is damaged"):
        run(tiny_sd(), checkpoint=tmp_path)
    assert path.read_bytes() == damaged[-1]


def other_weights() -> Any:
    pipe = tiny_sd()
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1
    return pipe


@pytest.mark.parametrize(
    ("make", "kwargs", "difference"),
    [
        (tiny_sd, {"prompt": "a dog"}, "prompt: 'a cat' there, 'a dog' now"),
        (tiny_sd, {"width": 208}, "width: 200 there, 208 now"),
        (tiny_sd, {"seed": 1}, "generator: .*seed 0, .* there, .*seed 1, .* now"),
        (tiny_sd, {"num_inference_steps": 6}, "num_inference_steps: 4 there, 6 now"),
        (tiny_sd, {"prompt_embeds": torch.zeros(1, 40, 32), "prompt": None}, "prompt_embeds: None there, .*tensor"),
        (tiny_sd, {"tiling": still(overlap=8)}, "tiling.overlap: 4 there, 8 now"),
        (with_scheduler("EulerDiscreteScheduler"), {}, "scheduler: DDIMScheduler .* there, EulerDiscreteScheduler"),
        (other_weights, {}, "weights of unet"),
        (tiny_sdxl, {}, "pipeline: StableDiffusionPipeline there, StableDiffusionXLPipeline now"),
    ],
)
def test_another_run(make: Any, kwargs: dict[str, Any], difference: str, file: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(file)
    with pytest.raises(ValueError, match=rf"is of another run \(.*{difference}") as caught:
        run(make(), checkpoint=tmp_path, **kwargs)
    assert "choose another folder" in str(caught.value)
    assert (tmp_path / FILE).read_bytes() == file


def test_the_same_scheduler_in_another_process() -> None:
    """diffusers notes which values are defaults, from a set of strings: in another order in each process."""
    pipe, other = tiny_sd(), tiny_sd()
    noted = dict(other.scheduler.config)
    noted["_use_default_values"] = noted["_use_default_values"][::-1]
    other.scheduler._internal_dict = FrozenDict(noted)
    assert other.scheduler.config != pipe.scheduler.config
    first, second = (settings_of(one, {}, {})["scheduler"] for one in (pipe, other))
    assert first == second


def test_runs_that_cannot_be_saved(tmp_path: Path) -> None:
    def callback(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors

    clipped = tiny_sd()
    clipped.scheduler = diffusers.DDIMScheduler.from_config(clipped.scheduler.config, clip_sample=True)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tiny_sd(), {"callback_on_step_end": callback}, "callback_on_step_end may change the latents"),
        (tiny_sd(), {"generator": None}, "needs generator="),
        (clipped, {}, "only the fused step can be resumed, and here: DDIMScheduler"),
        (tiny_sd(), {"guidance_rescale": 0.5}, "only the fused step can be resumed, and here: guidance_rescale needs"),
    ]
    for pipe, kwargs, message in cases:
        with pytest.raises(ValueError, match=f"checkpoint: {message}"):
            run(pipe, checkpoint=tmp_path, **kwargs)
    with pytest.raises(ValueError, match="PixArtSigmaPipeline keeps its own loop"):
        wrapped = TiledPipeline.from_pipe(build(tiny_pixart_sigma), tiling=still(tile=NATIVE, overlap=4))
        call(wrapped, tiny_pixart_sigma, (24, 32), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="leave out fused=False"):
        TiledPipeline.from_pipe(tiny_sd(), fused=False)("a cat", checkpoint=tmp_path)
    assert os.listdir(tmp_path) == []


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not a folder"):
        Checkpoint(tmp_path / "file")
    with pytest.raises(ValueError, match="there is no folder"):
        Checkpoint(tmp_path / "none" / "run")
    with pytest.raises(ValueError, match="every=0"):
        Checkpoint(tmp_path, every=0)


# ----------------------------------------------------------------------------- what may go wrong


def test_a_full_disk_keeps_the_last_state(file: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"checkpoint: .*{re.escape(FILE)} was not written: .*File too large"):
            run(tiny_sd(), checkpoint=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == [FILE]
    assert (tmp_path / FILE).read_bytes() == file


KILLED = """
import os, random, signal, sys
from tiledcore.cli.main import main
from tiledcore.tiles.denoiser import TileDenoiser

evaluate, last = TileDenoiser.evaluate, random.randrange(1, 6)

def dying(self, *args, **kwargs):
    global last
    last -= 1
    if last < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(self, *args, **kwargs)

TileDenoiser.evaluate = dying
main(sys.argv[1:])
"""


@pytest.mark.parametrize("extension", ["png", pytest.param("tif", marks=pytest.mark.slow)])
def test_kill_9_at_a_random_step(
    extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_sd().save_pretrained("model")
    out = f"a.{extension}"
    command = ["generate", "a coast", "--model", "model", "--size", "192x160", "--steps", "6", "--device", "cpu"]
    saving = [*command, "--checkpoint", "run", "--out", out]
    child = subprocess.run([sys.executable, "-c", KILLED, *saving], capture_output=True, text=True)
    assert child.returncode == -9, child.stderr
    seed = re.search(r"seed (\d+)", child.stderr)
    assert seed is not None and sorted(os.listdir()) == ["model", "run"]
    assert main(saving) == 0  # no seed given, neither then nor now
    assert re.search(r"run.checkpoint.pt: [1-5] of 6 steps are done", capsys.readouterr().err)
    assert sorted(os.listdir()) == [out, "model"]
    assert main([*command, "--seed", seed[1], "--out", f"b.{extension}"]) == 0
    assert Path(out).read_bytes() == Path(f"b.{extension}").read_bytes()


def test_another_process_in_the_same_folder_is_told_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = f"""
import time
from pathlib import Path
from tiledcore.loop.checkpoint import Checkpoint, locked
with locked(Checkpoint(Path({str(folder)!r}))):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"checkpoint: .*run: another process uses it"):
            run(tiny_sd(), checkpoint=folder)
        other.kill()
    run(tiny_sd(), checkpoint=folder)
    assert [path.name for path in folder.iterdir()] == [FILE]
