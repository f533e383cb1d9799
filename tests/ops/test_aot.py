"""Triton kernels compile for every supported GPU, without a GPU here, and fit its registers and shared memory.

Rows are kept in pytest's cache under a hash of kernels/, so they are computed once. The oldest admitted Triton is
tested where it lies in an ignored folder: see bench/resources.py.
"""

import fcntl
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from bench import resources  # noqa: E402

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use
# Instructions per matrix instruction of the attention kernel, at most, for D = 64 and 128. Triton 3.6 and 3.9 need up
# to 12 on sm_80, 86 and 89, 78 on sm_90 (wgmma), 65 on sm_100, 13 on sm_120.
INSTRUCTIONS = {80: 12, 86: 12, 89: 12, 90: 90, 100: 75, 120: 15}
Rows = list[dict[str, Any]]


def compiled(request: pytest.FixtureRequest, which: str, folder: Path | None = None) -> Rows:
    """Rows of ``which`` variants: from the cache, or compiled now, by the Triton in a folder or the installed one."""
    cache = request.config.cache.mkdir("compiled")
    version = triton.__version__ if folder is None else folder.name
    sources = [*sorted((resources.ROOT / "kernels").glob("*.py")), Path(resources.__file__)]
    digest = sha256(b"\0".join([version.encode(), *(source.read_bytes() for source in sources)]))
    kept = cache / f"{which}-{digest.hexdigest()[:16]}.json"
    with (cache / f"{which}.lock").open("w") as lock:  # pytest-xdist: one process compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(json.dumps(resources.rows_of(which, folder)))
    found: Rows = json.loads(kept.read_text())
    return found


@pytest.fixture(scope="module")
def everything(request: pytest.FixtureRequest) -> Rows:
    return compiled(request, "all")


def check(rows: Rows) -> None:
    """No error, no spilled register, no more shared memory than there is."""
    for row in rows:
        assert "error" not in row, row
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], row


def check_production(rows: Rows, capabilities: set[int]) -> None:
    """Matrix instructions in all attention kernels, TMA on Hopper and Blackwell, and few instructions around them."""
    check(rows)
    attention = [row for row in rows if row["kernel"] == "neighbor_attention"]
    wide = [row for row in attention if row["constants"]["D"] in ("64", "128")]
    assert {(row["capability"], row["constants"]["D"]) for row in wide} == {
        (capability, D) for capability in capabilities for D in ("64", "128")
    }
    for row in attention:
        assert row["matrix"] > 0 and (row["TMA loads"] > 0) == row["TMA"], row
    for row in wide:
        assert row["TMA"] == (row["capability"] in (90, 100)), row
        assert row["instructions"] <= INSTRUCTIONS[row["capability"]] * row["matrix"], row


def test_production_variants_on_two_gpus(request: pytest.FixtureRequest) -> None:
    check_production(compiled(request, "gate"), {89, 90})


@pytest.mark.slow
@pytest.mark.skipif(not resources.OLDEST.exists(), reason=f"there is no {resources.OLDEST}")
def test_production_variants_and_their_table(request: pytest.FixtureRequest) -> None:
    """Both Tritons; and the table in bench/results is what they give: ``python -m bench.resources`` writes it."""
    oldest, installed = compiled(request, "production", resources.OLDEST), compiled(request, "production")
    assert {row["triton"] for row in oldest} == {"3.6.0"}
    check_production(oldest, set(resources.CAPABILITIES))
    check_production(installed, set(resources.CAPABILITIES))
    assert resources.TABLE.read_text() == resources.table(oldest + installed)


@pytest.mark.slow
def test_every_variant_compiles_without_spills(everything: Rows) -> None:
    check(everything)
    kernels = {(row["kernel"], row["capability"]) for row in everything}
    names = {"gather_tiles", "blend_tiles", "fused_step", "neighbor_attention", "group_norm_silu"}
    assert kernels >= {(name, capability) for name in names for capability in SHARED_LIMIT}


@pytest.mark.slow
def test_attention_has_a_variant_for_every_dtype_and_head_dimension(everything: Rows) -> None:
    there = {
        (row["elements"][0], row["constants"]["D"], row["capability"])
        for row in everything
        if row["kernel"] == "neighbor_attention"
    }
    for capability in SHARED_LIMIT:
        for D in ("40", "64", "80", "96", "128", "160"):
            for element in ("fp16", "bf16", "fp32"):
                assert (element, D, capability) in there


@pytest.mark.slow
def test_hopper_reads_whole_patches_by_tma(everything: Rows) -> None:
    by_descriptor = {(row["capability"], row["constants"]["D"]) for row in everything if row["TMA"]}
    assert by_descriptor == {(capability, D) for capability in (90, 100) for D in ("64", "128")}
