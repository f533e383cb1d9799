"""Between steps the host waits for nothing, and a step that can be captured holds nothing that a graph cannot."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import capture_safety
import pytest

SCRIPT = Path(capture_safety.__file__)
TABLE = SCRIPT.parents[1] / "bench" / "results" / "capture_safety.md"
FUSED = ("sd", "sd_ancestral", "sdxl", "sd3", "flux", "sample")


def rows(*families: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", SCRIPT, "--json", *families]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def check(row: dict[str, Any]) -> None:
    """No wait that is the package's; captured, or a reason."""
    assert [wait for wait in row["waits"] if wait[0] == "tiledcore"] == [], row
    assert row["fused"] == (row["family"] in FUSED), row
    captured = row["fused"] and row["mode"] != "moving" and row["family"] != "sample"
    assert row["captures"] == captured and (row["reason"] is None) == (captured or not row["fused"]), row


def test_the_host_waits_for_nothing_and_steps_are_captured() -> None:
    for row in rows("flux", "sd_control", "sample"):
        check(row)


@pytest.mark.slow
def test_every_family_and_mode_and_their_table() -> None:
    found = rows()
    for row in found:
        check(row)
    assert TABLE.read_text() == capture_safety.table(found)
