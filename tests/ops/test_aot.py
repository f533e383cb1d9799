"""Triton kernels compile for every supported GPU, without a GPU here, and fit its registers and shared memory.

Results are kept in pytest's cache under a hash of kernels/, so they are computed once. The oldest Triton that is
admitted is tested where it lies in an ignored folder:
``pip install --no-deps --target .whl/triton-3.6.0 triton==3.6.0``.
"""

import fcntl
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use
# SASS instructions per matrix instruction of the attention kernel, at most: Triton 3.6 and 3.9 need 10 and 78.
INSTRUCTIONS = {89: 12, 90: 90}
ROOT = Path(__file__).resolve().parents[2]
OLDEST = ROOT / ".whl" / "triton-3.6.0"
COMPILER = Path(__file__).with_name("compile_kernels.py")
Rows = list[dict[str, Any]]


def compiled(cache: Path, which: str, compiler: Path | None = None) -> Rows:
    """Rows of ``which`` variants (``gate`` or ``all``): from the cache, or compiled now.

    ``compiler``: a folder with another Triton than the installed one.
    """
    version = triton.__version__ if compiler is None else compiler.name
    sources = [*sorted((ROOT / "kernels").glob("*.py")), ROOT / "bench" / "resources.py", COMPILER]
    digest = sha256(b"\0".join([version.encode(), *(source.read_bytes() for source in sources)]))
    kept = cache / f"{which}-{digest.hexdigest()[:16]}.json"
    with (cache / f"{which}.lock").open("w") as lock:  # pytest-xdist: one process compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            if compiler is not None:
                environment["PYTHONPATH"] = os.pathsep.join(
                    filter(None, [str(compiler), environment.get("PYTHONPATH")])
                )
            command = [sys.executable, COMPILER, which]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            kept.write_text(result.stdout)
    return json.loads(kept.read_text())


@pytest.fixture(scope="module")
def everything(request: pytest.FixtureRequest) -> Rows:
    return compiled(request.config.cache.mkdir("compiled"), "all")


def check(rows: Rows) -> None:
    """No error, no spilled register, no more shared memory than there is."""
    for row in rows:
        assert "error" not in row, row
        assert row["usage"]["STACK"] == 0 and row["usage"]["LOCAL"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], row


def check_production(rows: Rows) -> None:
    """Matrix instructions in all attention kernels, TMA on Hopper, and few instructions around them."""
    check(rows)
    attention = [row for row in rows if row["kernel"] == "neighbor_attention_kernel"]
    assert {(row["capability"], row["constants"]["D"]) for row in attention} == {
        (capability, D) for capability in INSTRUCTIONS for D in ("64", "128")
    }
    for row in attention:
        assert (row["TMA loads"] > 0) == row["TMA"] == (row["capability"] == 90), row
        assert 0 < row["instructions"] <= INSTRUCTIONS[row["capability"]] * row["matrix"], row


def test_production_variants(request: pytest.FixtureRequest) -> None:
    check_production(compiled(request.config.cache.mkdir("compiled"), "gate"))


@pytest.mark.slow
@pytest.mark.skipif(not OLDEST.exists(), reason=f"there is no {OLDEST}")
def test_production_variants_of_the_oldest_triton(request: pytest.FixtureRequest) -> None:
    rows = compiled(request.config.cache.mkdir("compiled"), "gate", OLDEST)
    assert {row["triton"] for row in rows} == {"3.6.0"}
    check_production(rows)


@pytest.mark.slow
def test_every_variant_compiles_without_spills(everything: Rows) -> None:
    check(everything)
    kernels = {(row["label"].split()[0], row["capability"]) for row in everything}
    names = {"gather_tiles", "blend_tiles", "fused_step", "neighbor_attention", "group_norm_silu"}
    assert kernels >= {(name, capability) for name in names for capability in SHARED_LIMIT}


@pytest.mark.slow
def test_attention_has_a_variant_for_every_dtype_and_head_dimension(everything: Rows) -> None:
    there = {
        (row["elements"][0], row["constants"]["D"], row["capability"])
        for row in everything
        if row["kernel"] == "neighbor_attention_kernel"
    }
    for capability in SHARED_LIMIT:
        for D in ("40", "64", "80", "96", "128", "160"):
            for element in ("fp16", "bf16", "fp32"):
                assert (element, D, capability) in there


@pytest.mark.slow
def test_hopper_reads_whole_patches_by_tma(everything: Rows) -> None:
    by_descriptor = {(row["capability"], row["constants"]["D"]) for row in everything if row["TMA"]}
    assert by_descriptor == {(capability, D) for capability in (90, 100) for D in ("64", "128")}
