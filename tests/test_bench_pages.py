"""What is made of the results of benchmarks: the tables in the pages, the GPU suite."""

import json
from pathlib import Path

import pytest
from bench_results import MODES, SUITE

from bench import gpu_suite, tables

# ----------------------------------------------------------------------------- pages


def test_tables_are_filled_again_and_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:modes-earth-1024 -->\nold\n<!-- /bench:modes-earth-1024 -->\nafter\n")
    assert tables.main(pages=[page], results=tmp_path) == 0
    assert "Not measured yet" in page.read_text() and "old" not in page.read_text()
    (tmp_path / "modes_earth_1024.json").write_text(json.dumps(MODES))
    assert tables.main(check=True, pages=[page], results=tmp_path) == 1
    tables.main(pages=[page], results=tmp_path)
    text = page.read_text()
    assert "- slow: worse in seam (+0.1000 ± 0.0100)" in text and "| slow | 4.0 | 1.10 | 0.0100 |" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert tables.main(check=True, pages=[page], results=tmp_path) == 0
    with pytest.raises(ValueError, match="bench:nothing: must be one of"):
        tables.filled("<!-- bench:nothing -->\n<!-- /bench:nothing -->")
    with pytest.raises(ValueError, match="1 markers bench:… are opened and 0 are closed"):
        tables.filled("<!-- bench:modes-earth-1024 -->\n")


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
    write = f"from pathlib import Path; Path({str(tmp_path / 'more.json')!r}).write_text({json.dumps(SUITE)!r})"
    fakes = [
        gpu_suite.Step("tests", ["-c", "print('one failed'); raise SystemExit(1)"], 20),
        gpu_suite.Step("suite", ["-c", "import time; time.sleep(60)"], 20),
        gpu_suite.Step("more", ["-c", write], 20, "more.json"),
    ]
    monkeypatch.setattr(gpu_suite, "steps", lambda out, dry: fakes)
    monkeypatch.setattr(gpu_suite, "SHORTEST", 0.5)
    monkeypatch.setattr(gpu_suite, "DRY_LIMIT", 1.5)
    assert gpu_suite.main([str(tmp_path), "--dry-run"]) == 1
    data = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert [step["status"] for step in data["steps"]] == ["failed", "out of time", "passed"]
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "Tests of the kernels: **failed**" in page and "one failed" in page
    assert "no figure here is of a GPU" in page
    assert gpu_suite.run(fakes[0], 0.4, tmp_path)["tail"] == "not started"
