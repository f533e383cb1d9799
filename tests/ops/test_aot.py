"""Every Triton variant that can be launched compiles for every supported GPU, without a GPU here.

bench/resources.py compiles, in a process of its own, because this one has Triton's interpreter switched
on, with which nothing is compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use
COMPILER = Path(__file__).resolve().parents[2] / "bench" / "resources.py"


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, COMPILER, "--json"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_configuration_compiles(compiled: list[dict[str, Any]]) -> None:
    kernels = {(job["label"].split()[0], job["capability"]) for job in compiled}
    names = {"gather_tiles", "blend_tiles", "fused_step", "neighbor_attention", "group_norm_silu"}
    assert kernels >= {(name, capability) for name in names for capability in SHARED_LIMIT}
    assert [job for job in compiled if "error" in job] == []


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    for job in compiled:
        assert job["usage"]["STACK"] == 0 and job["usage"]["LOCAL"] == 0, job


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    for job in compiled:
        assert job["shared"] <= SHARED_LIMIT[job["capability"]], job


def test_attention_has_a_variant_for_every_dtype_and_head_dimension(compiled: list[dict[str, Any]]) -> None:
    there = {
        (job["label"].split()[0], job["elements"][0], job["constants"]["D"], job["capability"])
        for job in compiled
        if job["kernel"].startswith("neighbor_attention")
    }
    for capability in SHARED_LIMIT:
        for D in ("40", "64", "80", "96", "128", "160"):
            for element in ("fp16", "bf16", "fp32"):
                assert ("neighbor_attention", element, D, capability) in there


def test_hopper_reads_whole_patches_by_tma(compiled: list[dict[str, Any]]) -> None:
    by_descriptor = {(job["capability"], job["constants"]["D"]) for job in compiled if job["TMA"]}
    assert by_descriptor == {(capability, D) for capability in (90, 100) for D in ("64", "128")}
