"""The command under torchrun: the same file, one voice, and an end when a process dies."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import on_ranks
from tiny_command import SCENE, saved_model, verbosity_put_back

from tiledcore.cli.main import main

COMMAND = ["generate", "a coast", "--model", "model", "--size", "192x160", "--steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command")
    saved_model(path / "model")
    (path / "scene.toml").write_text(SCENE)
    return path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def command(*more: str) -> Any:
    """The command as one of torchrun's processes; what it returned, and what it wrote to its stderr."""

    def work(rank: int) -> tuple[int, str]:
        log = os.open(f"log{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 2)
        sys.stderr = os.fdopen(log, "w")
        with verbosity_put_back():
            code = main([*COMMAND, *more])
        sys.stderr.flush()
        return code, Path(f"log{rank}").read_text()

    return work


def ends_well(count: int, *more: str) -> bool:
    """Whether the command ends with code 0 on each of ``count`` processes; what they said is shown if one is gone."""
    results = on_ranks(count, command(*more), group=False)
    assert None not in results, "\n".join(Path(f"log{rank}").read_text() for rank in range(count))
    return [code for code, _ in results] == [0] * count


def test_one_file_one_bar_one_report(here: Path) -> None:
    assert main([*COMMAND, "--seed", "5", "--out", "one.png"]) == 0
    (code, said), (other, silent) = on_ranks(2, command("--seed", "5", "--out", "two.png"), group=False)
    assert code == other == 0
    assert Path("two.png").read_bytes() == Path("one.png").read_bytes()
    assert silent == ""
    assert said.count("| 0/3 ") == 1 and len(re.findall(r"^2 ranks: .* MiB received per step$", said, re.M)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    "more",
    [
        ["--stages", "auto", "--size", "256x256"],
        ["--regions", "scene.toml"],
        ["--wrap", "x", "--motion", "still"],
        ["--scheduler", "euler-a", "--overlap", "4"],
        ["--checkpoint", "run"],
    ],
)
def test_the_file_is_that_of_one_process(here: Path, count: int, more: list[str]) -> None:
    assert main([*COMMAND, "--seed", "5", *more, "--out", "one.png"]) == 0
    assert ends_well(count, "--seed", "5", *more, "--out", "many.png")
    assert Path("many.png").read_bytes() == Path("one.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--motion", "still", "--overlap", "8"],
        ["--stages", "auto", "--size", "512x512"],
        ["--regions", "scene.toml"],
        ["--wrap", "x", "--motion", "still"],
    ],
)
def test_the_file_of_a_transformer_is_that_of_one_process(here: Path, more: list[str]) -> None:
    flux = ["--model", "earth-flux", "--size", "512x384", "--seed", "5", *more]
    assert main([*COMMAND, *flux, "--out", "one.png"]) == 0
    for count in (2, 3, 4):
        assert ends_well(count, *flux, "--out", "many.png")
        assert Path("many.png").read_bytes() == Path("one.png").read_bytes()


def test_an_error_is_told_once(here: Path) -> None:
    results = on_ranks(2, command("--tile", "7", "--overlap", "9", "--out", "no.png"), group=False)
    assert results == [None, None]  # they ended at once, with code 2
    said = "".join(Path(f"log{rank}").read_text() for rank in range(2))
    assert said.count("error: overlap=") == said.count("error") == 1


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_kill_9_of_a_rank_at_a_random_step(attempt: int, here: Path) -> None:
    """torchrun ends with code 1 and one line of ours; another number of ranks goes on to the file of one process."""
    call = ["-m", "tiledcore", *COMMAND, "--steps", "30", "--size", "384x384", "--seed", "5"]
    launch = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node"]
    count, which = [(2, 1), (2, 0), (4, 3), (3, 0), (4, 1)][attempt % 5]
    saving = ["--checkpoint", f"run{attempt}", "--out", f"{attempt}.png"]
    if not Path("whole.png").exists():
        subprocess.run([sys.executable, *call, "--out", "whole.png"], check=True, capture_output=True, timeout=120)
    with open("errors", "w") as errors, subprocess.Popen([*launch, str(count), *call, *saving], stderr=errors) as run:
        deadline = time.monotonic() + 90
        while not Path(f"run{attempt}/checkpoint.pt").exists():
            assert run.poll() is None and time.monotonic() < deadline, Path("errors").read_text()
            time.sleep(0.02)
        time.sleep(random.random() * 0.5)
        killed = time.monotonic()
        os.kill(_ranks_of(run.pid)[which], signal.SIGKILL)
        assert run.wait(60) == 1 and time.monotonic() - killed < 30
    ours = [line for line in Path("errors").read_text().splitlines() if line.startswith("tiledcore: rank")]
    assert len(ours) == 1 and "another of the" in ours[0], Path("errors").read_text()
    other = [2, 1, 3][attempt % 3]
    start = [*launch, str(other)] if other > 1 else [sys.executable]
    again = subprocess.run([*start, *call, *saving], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "of 30 steps are done" in again.stderr, again.stderr
    assert Path(f"{attempt}.png").read_bytes() == Path("whole.png").read_bytes()
    assert not Path(f"run{attempt}").exists()


def _ranks_of(parent: int) -> dict[int, int]:
    """Rank -> process, of torchrun's children."""
    found = {}
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        rank = re.search(rb"\0RANK=(\d+)", Path(f"/proc/{child}/environ").read_bytes())
        if rank is not None:
            found[int(rank[1])] = int(child)
    return found
