"""What is made of the benchmarks' results: the peers' verdict, tables in the pages, scaling, the GPU suite."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_results import PEERS, SCALING

from bench import gpu_suite, peers_table, scaling, tables

# ----------------------------------------------------------------------------- pages


def test_verdict_says_where_a_peer_is_not_beaten() -> None:
    beaten, faster, better = peers_table.verdict(PEERS["rows"])  # type: ignore[arg-type]
    assert beaten == "beaten: tiledcore, shift is 2.0× as fast, at equal or better seam ratio and patches"
    assert faster.startswith("faster: NOT ahead: as good, but slower (0.5×")
    assert better.startswith("better: NOT ahead: no way of ours is as good in both its seam ratio, 0.90")
    assert better.endswith("the best of ours in each are 1.00, 0.0100")


def test_judge_finds_planted_seams_on_a_method_s_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_table, "patch_distance", lambda windows, native: 0.5)  # slow, and tested elsewhere
    rng = np.random.default_rng(0)
    native = rng.random((32, 256, 256, 3))
    image = rng.random((768, 768, 3))
    plain = peers_table.judge(image, image, native, [32, 64], 32)
    assert plain["seam_mean"] == pytest.approx(1, abs=0.05) and plain["seam_worst_over_limit"] < 1.05
    assert plain["psnr_to_whole"] == float("inf") and plain["patches"] == 0.5
    found = []
    for strength in (0.5, 1.0, 2.0):
        seamed = image.copy()
        seamed[256:] += strength
        found.append(peers_table.judge(seamed, image, native, [32, 64], 32))
        elsewhere = peers_table.judge(seamed, image, native, [64], 32)
        assert elsewhere["seam_mean"] < 1.05 < found[-1]["seam_mean"] and found[-1]["seam_worst_over_limit"] > 1.2
    assert [f["seam_mean"] for f in found] == sorted(f["seam_mean"] for f in found)
    assert [f["tone"] for f in found] == sorted(f["tone"] for f in found)


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
    page.write_text("before\n<!-- bench:peers -->\nold\n<!-- /bench:peers -->\nbetween\n<!-- bench:scaling -->\n"
                    "<!-- /bench:scaling -->\nafter\n")  # fmt: skip
    assert tables.main(pages=[page], results=tmp_path) == 0
    assert page.read_text().count("Not measured yet") == 2 and "old" not in page.read_text()
    (tmp_path / "peers_earth.json").write_text(json.dumps(PEERS))
    (tmp_path / "scaling_earth.json").write_text(json.dumps(SCALING))
    assert tables.main(check=True, pages=[page], results=tmp_path) == 1
    tables.main(pages=[page], results=tmp_path)
    text = page.read_text()
    assert "- beaten: is beaten" in text and "| 512² | 2.6 |" in text
    assert text.startswith("before\n") and "\nbetween\n" in text and text.endswith("\nafter\n")
    assert tables.main(check=True, pages=[page], results=tmp_path) == 0
    with pytest.raises(ValueError, match="bench:nothing: must be one of"):
        tables.filled("<!-- bench:nothing -->\n<!-- /bench:nothing -->")
    with pytest.raises(ValueError, match="1 markers bench:… are opened and 0 are closed"):
        tables.filled("<!-- bench:peers -->\n")


def test_the_pages_of_the_repository_are_what_the_results_say() -> None:
    assert tables.main(check=True) == 0


# ----------------------------------------------------------------------------- scaling, GPU suite


def test_fitted_powers() -> None:
    rows = [
        {"size": size, "seconds": 3e-6 * size**2, "growth_bytes": size**3, "peak_bytes": 10**9}
        for size in (512, 1024, 4096)
    ]
    powers = scaling.fits([*rows, {"size": 8192, "not_run": "no memory"}])
    assert powers == pytest.approx({"seconds": 1, "growth_bytes": 1.5, "peak_bytes": 0})
    assert scaling.fits(rows[:1]) == {}


def test_scaling_keeps_what_was_measured_and_tells_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []

    def run(arguments: list[str], **_: Any) -> Any:
        size = int(arguments[arguments.index("--one") + 1])
        sizes.append(size)
        row = {"size": size, "seconds": size**2 / 1e6, "growth_bytes": size**2, "peak_bytes": size**2}
        failed = size == 1024
        return type("Done", (), {"returncode": int(failed), "stdout": json.dumps(row), "stderr": "boom\nMemoryError"})

    monkeypatch.setattr(scaling.subprocess, "run", run)
    for _ in range(2):
        scaling.main(["--sizes", "256", "512", "1024", "--work", str(tmp_path), "--device", "cpu"])
    assert sizes == [256, 512, 1024, 1024]
    said = capsys.readouterr().out
    assert "seconds 1.00" in said and "| 1024² | not run: MemoryError" in said


def test_gpu_suite_fits_its_time_and_begins_with_the_tests(tmp_path: Path) -> None:
    real = gpu_suite.steps(tmp_path, dry=False)
    assert real[0].name == "tests" and not any("collect-only" in part for part in real[0].command)
    assert gpu_suite.LIMIT < 9 * 60
    for name in gpu_suite.TESTS:
        assert any(part.endswith(f"{name}.py") for part in real[0].command), name
    assert all("cpu" not in step.command for step in real)
    assert {step.name for step in gpu_suite.steps(tmp_path, dry=True)} <= {step.name for step in real}


def test_gpu_suite_goes_on_after_a_failure_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = f"from pathlib import Path; Path({str(tmp_path / 'scaling.json')!r}).write_text({json.dumps(SCALING)!r})"
    fakes = [
        gpu_suite.Step("tests", ["-c", "print('one failed'); raise SystemExit(1)"], 20),
        gpu_suite.Step("graph", ["-c", "import time; time.sleep(60)"], 20),
        gpu_suite.Step("scaling", ["-c", write], 20, "scaling.json"),
    ]
    monkeypatch.setattr(gpu_suite, "steps", lambda out, dry: fakes)
    monkeypatch.setattr(gpu_suite, "DRY_LIMIT", 5.2)
    assert gpu_suite.main([str(tmp_path), "--dry-run"]) == 1
    data = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert [step["status"] for step in data["steps"]] == ["failed", "out of time", "passed"]
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "Tests of the kernels: **failed**" in page and "one failed" in page and "| 512² |" in page
    assert "no figure here is of a GPU" in page
    assert gpu_suite.run(fakes[0], 3.0, tmp_path)["tail"] == "not started"
