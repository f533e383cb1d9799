"""What is made of the results of benchmarks: the verdict on peers, the tables in the pages, the GPU suite."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_results import PEERS

from bench import gpu_suite, peers_table, study, tables

# ----------------------------------------------------------------------------- pages


def test_verdict_says_where_a_peer_is_not_beaten() -> None:
    beaten, faster, better = peers_table.verdict(PEERS["rows"])
    assert beaten == "beaten: tiledcore, shift is 2.0× as fast, at equal or better seam ratio and patches"
    assert faster.startswith("faster: NOT ahead: as good, but slower (0.5×")
    assert better.startswith("better: NOT ahead: no way of ours is as good in both its seam ratio, 0.90")
    assert better.endswith("the best of ours in each are 1.00, 0.0100")


def test_judge_finds_planted_seams_on_a_method_s_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "patch_distance", lambda windows, native: 0.5)  # slow, and tested elsewhere
    monkeypatch.setattr(study, "WINDOWS", 8)
    rng = np.random.default_rng(0)
    native, image = rng.random((8, 256, 256, 3)), rng.random((768, 768, 3))
    plain = peers_table.judge(image, native, [32, 64], 32)
    assert plain["seam_mean"] == pytest.approx(1, abs=0.05) and plain["seam_worst_over_limit"] < 1.05
    assert plain["likeness"] > 0.9 and plain["patches"] == 0.5
    found = []
    for strength in (0.5, 2.0):
        seamed = image.copy()
        seamed[256:] += strength
        found.append(peers_table.judge(seamed, native, [32, 64], 32))
        elsewhere = peers_table.judge(seamed, native, [64], 32)
        assert elsewhere["seam_mean"] < 1.05 < found[-1]["seam_mean"] and found[-1]["seam_worst_over_limit"] > 1.2
    assert plain["tone"] < found[0]["tone"] < found[1]["tone"] and found[0]["seam_mean"] < found[1]["seam_mean"]


def test_lines_are_where_windows_start_and_end() -> None:
    assert peers_table.lines("MultiDiffusion, stride 1/2", 16, 96, 32) == [16, 32, 48, 64, 80]
    assert peers_table.lines("SpotDiffusion", 32, 96, 32) == [32, 64]
    assert peers_table.lines("tiledcore, shift", 0, 96, 32) == [32, 64]
    assert peers_table.lines("diffusers' panorama as it ships", 8, 64, 32) == [32]
    assert peers_table.lines("diffusers' panorama as it ships", 8, 80, 32) == [8, 16, 64, 72]


def test_an_image_that_was_made_is_not_made_again(tmp_path: Path) -> None:
    calls = []

    def run() -> Any:
        calls.append(1)
        return np.full((8, 8, 3), 0.2), {"seconds": 3.0}

    for _ in range(2):
        image, cost = peers_table.made(tmp_path / "a way.png", run)
        assert image == pytest.approx(np.full((8, 8, 3), 0.2)) and cost == {"seconds": 3.0}
    assert len(calls) == 1


def test_tables_are_filled_again_and_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:peers -->\nold\n<!-- /bench:peers -->\nafter\n")
    assert tables.main(pages=[page], results=tmp_path) == 0
    assert "Not measured yet" in page.read_text() and "old" not in page.read_text()
    (tmp_path / "peers_earth.json").write_text(json.dumps(PEERS))
    assert tables.main(check=True, pages=[page], results=tmp_path) == 1
    tables.main(pages=[page], results=tmp_path)
    text = page.read_text()
    assert "- beaten: is beaten" in text and "| tiledcore, slow | 4.0 | 1.00 | 0.0100 |" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert tables.main(check=True, pages=[page], results=tmp_path) == 0
    with pytest.raises(ValueError, match="bench:nothing: must be one of"):
        tables.filled("<!-- bench:nothing -->\n<!-- /bench:nothing -->")
    with pytest.raises(ValueError, match="1 markers bench:… are opened and 0 are closed"):
        tables.filled("<!-- bench:peers -->\n")


def test_the_pages_of_the_repository_are_what_the_results_say() -> None:
    assert tables.main(check=True) == 0


# ----------------------------------------------------------------------------- GPU suite


def test_gpu_suite_fits_its_time_and_begins_with_the_tests(tmp_path: Path) -> None:
    real = gpu_suite.steps(tmp_path, dry=False)
    assert real[0].name == "tests" and not any("collect-only" in part for part in real[0].command)
    assert gpu_suite.LIMIT < 9 * 60
    for name in gpu_suite.TESTS:
        assert any(part.endswith(f"test_{name}.py") for part in real[0].command), name
    assert all("cpu" not in step.command for step in real)
    assert {step.name for step in gpu_suite.steps(tmp_path, dry=True)} <= {step.name for step in real}


def test_gpu_suite_goes_on_after_a_failure_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = f"from pathlib import Path; Path({str(tmp_path / 'peers.json')!r}).write_text({json.dumps(PEERS)!r})"
    fakes = [
        gpu_suite.Step("tests", ["-c", "print('one failed'); raise SystemExit(1)"], 20),
        gpu_suite.Step("suite", ["-c", "import time; time.sleep(60)"], 20),
        gpu_suite.Step("peers", ["-c", write], 20, "peers.json"),
    ]
    monkeypatch.setattr(gpu_suite, "steps", lambda out, dry: fakes)
    monkeypatch.setattr(gpu_suite, "SHORTEST", 0.5)
    monkeypatch.setattr(gpu_suite, "DRY_LIMIT", 1.5)
    assert gpu_suite.main([str(tmp_path), "--dry-run"]) == 1
    data = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert [step["status"] for step in data["steps"]] == ["failed", "out of time", "passed"]
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "Tests of the kernels: **failed**" in page and "one failed" in page and "| beaten | 2.0 |" in page
    assert "no figure here is of a GPU" in page
    assert gpu_suite.run(fakes[0], 0.4, tmp_path)["tail"] == "not started"
