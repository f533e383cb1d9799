"""Calls of different sizes use one compiled variant of each Triton kernel, of the norm two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_sizes_do_not_compile_variants() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("count_variants.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    # The norm has one for sizes and strides that are all multiples of 16, which lets a thread move 16 bytes at a time.
    assert counts.pop("group_norm_silu") == 2 and set(counts.values()) == {1}, result.stdout
