"""Every block of README.md and docs/*.md and every example runs, at a small size and on tiny models."""

from __future__ import annotations

import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionXLPipeline
from pages import PAGES, ROOT, SHRINK, Block, blocks, skipped, smaller
from PIL import Image
from tiny import tiny_sdxl
from tiny_command import saved_model, verbosity_put_back
from tiny_transformers import build, tiny_flux, tiny_sd3

import tiledcore
from tiledcore.cli.main import main

STEPS = 3
PLANNED = "low_memory"
"""The example that simulates a step to plan a call: only in the slow tests."""
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the hub's names of models are folders with tiny ones of the same classes."""
    folder = tmp_path_factory.mktemp("pages")
    tiny_sdxl().save_pretrained(folder / "stabilityai/stable-diffusion-xl-base-1.0")
    build(tiny_flux).save_pretrained(folder / "black-forest-labs/FLUX.1-dev")
    build(tiny_sd3).save_pretrained(folder / "stabilityai/stable-diffusion-3.5-medium")
    net = ControlNetModel.from_unet(tiny_sdxl().unet, conditioning_channels=3)
    net.save_pretrained(folder / "xinsir/controlnet-tile-sdxl-1.0")
    saved_model(folder / "tiny")
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder as :func:`furnish` makes it; calls take STEPS steps by default."""
    furnish(tmp_path, models)
    monkeypatch.chdir(tmp_path)
    for cls in (tiledcore.TiledPipeline, StableDiffusionXLPipeline):
        monkeypatch.setattr(cls, "__call__", quick(cls.__call__))
    with verbosity_put_back():
        yield tmp_path


def furnish(folder: Path, models: Path) -> None:
    """Put the models and the pictures that pages speak of into a folder."""
    for path in models.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "docs").symlink_to(ROOT / "docs")
    small = 1024 // SHRINK
    Image.effect_noise((small, small), 60).convert("RGB").save(folder / "photo.jpg")
    mask = Image.new("L", (small, small))
    mask.paste(255, (32, 32, 96, 96))
    mask.save(folder / "mask.png")


def quick(call: Any) -> Any:
    @functools.wraps(call)
    def few_steps(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **{"num_inference_steps": STEPS} | kwargs)

    return few_steps


def names() -> dict[str, Any]:
    """What a block may use without saying where it comes from."""
    photo, mask = Image.open("photo.jpg").convert("RGB"), Image.open("mask.png")
    modules = {"torch": torch, "tiledcore": tiledcore, "__name__": "page"}
    loop = {"denoise": lambda x, timestep: x, "noise": torch.randn(1, 4, 16, 24), "scheduler": DDIMScheduler()}
    return modules | loop | {"prompt": "a coast", "photo": photo, "mask": mask, "pipe": tiny_sdxl()}


def run_command(words: list[str]) -> None:
    """Run one line of the shell in this process."""
    if words[0] == "python":
        return run_example(Path(words[1]), words[2:])
    assert words[0] == "tiledcore", f"{words}: neither run nor in SKIPPED_COMMANDS"
    try:
        code = main(lighter(words)[1:])
    except SystemExit as end:  # --help
        code = end.code or 0
    assert code == 0, f"{words}: exit code {code}"


def lighter(words: list[str]) -> list[str]:
    """A command on a CPU and in two processes; making images with a tiny model instead of the embedded one."""
    words = ["2" if before == "--nproc-per-node" else word for before, word in zip(["", *words], words, strict=False)]
    if "generate" in words or "profile" in words:
        words += ["--device", "cpu", "--dtype", "fp32"]
        words += [] if "--model" in words else ["--model", "tiny"]
        words += [] if "--steps" in words else ["--steps", str(STEPS)]
    return words


def run_example(path: Path, arguments: list[str]) -> None:
    argv, sys.argv = sys.argv, [str(path), *arguments]
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    finally:
        sys.argv = argv


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["gate", "slow"])
def test_every_python_block_of_a_page_runs(page: Path, slow: bool, here: Path, models: Path) -> None:
    """Each by itself, in a folder of its own."""
    for block in runnable(page, "python", "diff"):
        if block.slow != slow:
            continue
        folder = here / f"line{block.line}"
        folder.mkdir()
        furnish(folder, models)
        os.chdir(folder)
        with told(block):
            exec(compile(block.python(), str(block.page), "exec"), names())


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, here: Path) -> None:
    """All of a page in one folder; a `toml` block is scene.toml."""
    for block in runnable(page, "sh", "toml"):
        with told(block):
            if block.language == "toml":
                Path("scene.toml").write_text(smaller(block.text))
                continue
            for words in block.commands():
                if skipped(words) is None and words[0] != "torchrun":
                    run_command(words)


def runnable(page: Path, *languages: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in languages and block.reason is None]


@contextmanager
def told(block: Block) -> Iterator[None]:
    """An error says which block it is in."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the block at {block}")
        raise


def test_links_of_pages_lead_to_files_and_headings() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            path = (page.parent / name) if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in headings(path), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_drawings_are_those_of_the_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import drawings

    for name, drawing in drawings.drawings().items():
        assert (drawings.FOLDER / f"{name}.svg").read_text() == drawing, "python docs/drawings.py draws them again"


def several() -> list[list[str]]:
    return [words for page in PAGES for b in runnable(page, "sh") for words in b.commands() if words[0] == "torchrun"]


@pytest.mark.slow
@pytest.mark.parametrize("words", several(), ids=" ".join)
def test_every_torchrun_line_runs(words: list[str], here: Path) -> None:
    words = [str(Path(sys.executable).with_name("torchrun")), *lighter(words)[1:]]
    assert subprocess.run(words, timeout=300).returncode == 0


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != PLANNED], ids=lambda path: path.stem)
def test_every_example_runs_on_a_model_of_ones_own(path: Path, here: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
    run_example(path, ["--model", "tiny", "--size", "192", "--steps", str(STEPS)])


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs_on_the_embedded_model(path: Path, here: Path) -> None:
    shutil.rmtree("tiny", ignore_errors=True)
    run_example(path, ["--size", "320", "--steps", str(STEPS)])
