"""What is made of the results of benchmarks: the tables in the pages, the GPU suite."""

import json
import time
from pathlib import Path

import pytest
from bench_results import MODES

from bench import gpu_suite, tables

# ----------------------------------------------------------------------------- pages


def test_tables_are_filled_again_and_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:modes-earth-1024 -->\nold\n<!-- /bench:modes-earth-1024 -->\nafter\n")
    assert tables.main(page=page, results=tmp_path) == 0
    assert "Not measured yet" in page.read_text() and "old" not in page.read_text()
    (tmp_path / "modes_earth_1024.json").write_text(json.dumps(MODES))
    assert tables.main(check=True, page=page, results=tmp_path) == 1
    tables.main(page=page, results=tmp_path)
    text = page.read_text()
    assert "- slow: worse in seam (+0.1000 ± 0.0100)" in text and "| slow | 4.0 | 1.10 | 0.0100 |" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert tables.main(check=True, page=page, results=tmp_path) == 0
    with pytest.raises(ValueError, match="bench:nothing: must be one of"):
        tables.filled("<!-- bench:nothing -->\n<!-- /bench:nothing -->")
    with pytest.raises(ValueError, match="1 markers bench:… are opened and 0 are closed"):
        tables.filled("<!-- bench:modes-earth-1024 -->\n")


def test_the_pages_of_the_repository_are_what_the_results_say() -> None:
    assert tables.main(check=True) == 0


# ----------------------------------------------------------------------------- GPU suite


def test_the_limits_of_the_gpu_suite_fit_into_ten_minutes() -> None:
    assert sum(gpu_suite.LIMITS.values()) <= 570
    source = (Path(gpu_suite.__file__).parent / "gpu_parts.py").read_text()
    assert all(f'"{part}": ' in source for part in gpu_suite.LIMITS)


def test_a_killed_part_leaves_its_rows_and_the_suite_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"part": "ops", "case": "gather_tiles: small", "name": "triton", "seconds": 2e-5, "error": 0.0}
    late = tmp_path / "late"
    code = f"""
import subprocess, sys, time
with open({str(tmp_path / "gpu_suite.jsonl")!r}, "a") as rows:
    rows.write({json.dumps(row)!r} + chr(10) + "{{half a l")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(4); open({str(late)!r}, 'w')"])
time.sleep(60)
"""
    commands = {"ops": ["-c", code], "vae": ["-c", "print('no memory'); raise SystemExit(1)"]}
    run_part = gpu_suite.run_part
    monkeypatch.setattr(gpu_suite, "LIMITS", {"ops": 2, "vae": 5})
    monkeypatch.setattr(gpu_suite, "run_part", lambda name, command, *rest: run_part(name, commands[name], *rest))
    begin = time.monotonic()
    assert gpu_suite.main([str(tmp_path), "--dry-run", "--parts", "ops", "vae"]) == 1
    assert time.monotonic() - begin < 5
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "| ops | killed at its limit | 2" in page and "| vae | failed |" in page
    assert "| gather_tiles: small | triton |  | 20 µs | – | 0.0e+00 |" in page
    assert "no figure here is of a GPU" in page and page in capsys.readouterr().out
    assert "no memory" in (tmp_path / "gpu_suite.log").read_text()
    assert len(list(tmp_path.iterdir())) <= 8
    time.sleep(max(0.0, 5 - (time.monotonic() - begin)))
    assert not late.exists(), "a process that the part started outlived it"


def test_rows_show_the_prediction_and_what_is_wrong() -> None:
    fused = {
        "part": "blend",
        "case": "fused_step: DPM++ 2M, 25 tiles of 128x128x4, guidance, on 512x512",
        "name": "ramp",
    }
    rows = [fused | {"dtype": "float16", "seconds": 3e-5}, fused | {"wrong": "differs by 0.1"}]
    page = gpu_suite.page(rows, dry=False)
    assert "| 30 µs | 20–30 µs |" in page and "**wrong**: differs by 0.1" in page and "**1 wrong**" in page
