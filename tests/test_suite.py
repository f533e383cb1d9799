"""The suite of benchmarks: a wrong result is not timed, a slower one is reported, noise is not."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import bench_neighbor_attention as attention
from bench import measure, suite
from bench.case import Case, Ready, implementations, relative_error

CPU = torch.device("cpu")


class Double:
    """A provider that gives a value and says how long it takes."""

    def __init__(self, seconds: float, noise: float = 0.0, value: float = 1.0) -> None:
        self.seconds, self.noise, self.value, self.rng = seconds, noise, value, random.Random(0)

    def __call__(self) -> Tensor:
        return torch.tensor([self.value])

    def sample(self) -> float:
        return self.seconds * (1 + self.noise * self.rng.uniform(-1, 1))


def case(kernel: Any) -> Case:
    def prepare(device: torch.device, dtype: torch.dtype) -> Ready:
        runs = {"loop": Double(0.004), "kernel": kernel}
        moved = {"loop": 1000, "kernel": 1000}
        return Ready(runs, "loop", moved, lambda: torch.ones(1), 2000, not_run={"gpu": "no GPU"})

    return Case("double", "of nothing", "one", prepare, quick=True)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a case with times as the doubles say."""
    found = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e10}
    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: found)
    monkeypatch.setattr(measure, "median_seconds", lambda run, device, seconds: run.sample())

    def run(*kernels: Any, rounds: int = 9) -> dict[str, Any]:
        return suite.run([case(k) for k in kernels], CPU, torch.float32, 1.0, rounds)

    return run


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["results"]}


def test_rows_have_time_spread_error_and_share_of_the_ceiling(results: Any) -> None:
    rows = by_name(results(Double(0.002, noise=0.1, value=1 + 1e-6)))
    kernel = rows["kernel"]
    assert kernel["seconds"] == pytest.approx(0.002, rel=0.1) and len(kernel["samples"]) == 9
    assert kernel["low"] < kernel["seconds"] < kernel["high"]
    assert kernel["speedup"] == pytest.approx(0.004 / kernel["seconds"])
    assert kernel["of_ceiling"] == pytest.approx(1e-6 / kernel["seconds"])  # 1000 bytes at 1 GB/s
    assert kernel["error"] == pytest.approx(1e-6, rel=0.1)
    assert rows["loop"]["seconds"] == pytest.approx(0.004) and rows["loop"]["error"] == 0
    assert rows["gpu"]["not_run"] == "no GPU" and "seconds" not in rows["gpu"]


@pytest.mark.parametrize("value", [1.01, float("inf"), float("nan")])
def test_a_wrong_kernel_is_not_timed(results: Any, value: float) -> None:
    found = results(Double(0.001, value=value))
    rows = by_name(found)
    assert rows["kernel"]["wrong"].endswith("from one") and "seconds" not in rows["kernel"]
    assert "seconds" in rows["loop"]
    assert "wrong: differs by" in suite.text(rows["kernel"])


def test_a_kernel_that_fails_does_not_stop_the_others(results: Any) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel\nat line 1")

    rows = by_name(results(fails))
    assert rows["kernel"]["not_run"] == "RuntimeError: no such kernel" and "seconds" in rows["loop"]
    broken = Case("double", "broken", "one", fails)  # type: ignore[arg-type]
    found = suite.run([broken, case(Double(1.0))], CPU, torch.float32, 1.0, 5)["results"]
    assert found[0]["wrong"] == "could not be run: RuntimeError: no such kernel"
    assert [row["name"] for row in found if "seconds" in row] == ["loop", "kernel"]


def test_relative_error() -> None:
    exact = torch.tensor([1.0, -4.0])
    assert relative_error(exact + torch.tensor([0.3, 0.4]), exact) == pytest.approx(0.5 / 17**0.5)
    assert relative_error(exact[:1], exact) == float("inf")
    assert relative_error(torch.tensor([float("nan"), 0.0]), exact) == float("inf")


def test_interpreted_kernels_are_not_timed() -> None:
    runs, missing = implementations("blend_tiles", lambda impl: impl, CPU)
    assert runs["reference"]() == "reference" and "triton" not in runs
    assert missing["triton"] == "interpreted, its time would mean nothing"


OPS = ["gather_tiles", "blend_tiles", "fused_step", "group_norm_silu", "neighbor_attention", "vae_decode", "vae_encode"]


def test_cases_are_chosen_by_parts_of_their_names() -> None:
    cases = suite.all_cases()
    assert {case.op for case in cases} >= set(OPS)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.op for case in suite.chosen([], quick=True)} >= set(OPS)
    assert {case.op for case in suite.chosen(["blend"], quick=True)} == {"blend_tiles"}
    assert len(suite.chosen(["blend"], quick=False)) > len(suite.chosen(["blend"], quick=True))
    with pytest.raises(ValueError, match="case='blur': in no name"):
        suite.chosen(["blur"], quick=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite itself does this there")
@pytest.mark.parametrize("op", [op for op in OPS if op != "vae_encode"])
def test_real_cases_agree_with_their_oracles(op: str) -> None:
    smallest = min(suite.chosen([op], quick=True), key=lambda case: len(case.name))
    with torch.inference_mode():
        ready = smallest.prepare(CPU, torch.float32)
        assert ready.baseline in ready.runs
        ready.runs.pop("reference", None)  # slow, and it is the oracle itself
        errors, missing = suite.checked(ready)
        assert errors.keys() == ready.runs.keys() - {"copy"} and max(errors.values()) <= suite.LIMITS[torch.float32]
        assert all("impl" in reason or "on cpu" in reason or "interpreted" in reason for reason in missing.values())
    assert not ready.bytes or all(ready.bytes[name] > 0 for name in ready.runs)


# ----------------------------------------------------------------------------- compare


def jitter(median: float, noise: float, seed: int, count: int = 20) -> list[float]:
    rng = random.Random(seed)
    return [median * (1 + noise * rng.uniform(-1, 1)) for _ in range(count)]


@pytest.mark.parametrize(
    ("change", "noise", "verdict"),
    [
        (1.00, 0.0, "same"),
        (1.04, 0.0, "same"),  # below 5 %, however quiet
        (1.07, 0.002, "slower"),
        (0.90, 0.002, "faster"),
        (1.07, 0.20, "same"),  # within the noise
        (2.00, 0.20, "slower"),
    ],
)
def test_the_larger_of_five_per_cent_and_the_noise_decides(change: float, noise: float, verdict: str) -> None:
    assert suite.verdict(jitter(1.0, noise, 0), jitter(change, noise, 1, count=10))[0] == verdict


def test_noise_alone_is_almost_never_reported() -> None:
    wrong = 0
    for seed in range(200):
        noise = random.Random(seed).uniform(0, 0.4)
        wrong += suite.verdict(jitter(1, noise, 2 * seed), jitter(1, noise, 2 * seed + 1))[0] != "same"
    assert wrong <= 2


def test_a_slowed_kernel_is_caught_through_the_suite(
    results: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name for name in ("before", "same", "slowed")]
    for path, seconds in zip(paths, (0.004, 0.004, 0.008), strict=True):
        path.write_text(suite.dumps(results(Double(seconds, 0.1))))
    capsys.readouterr()
    assert command.main(["compare", str(paths[0]), str(paths[2])]) == 1
    told = [line.split()[4:6] for line in capsys.readouterr().out.splitlines()[1:]]
    assert told == [["slower", "kernel"], ["same", "loop"]]
    assert command.main(["compare", str(paths[0]), str(paths[1])]) == 0
    assert "slower" not in capsys.readouterr().out


def test_what_one_side_lacks_is_listed_and_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("kernel", "other"):
        rows = [{"case": "double", "name": name, "samples": [1.0] * 5}]
        (tmp_path / name).write_text(json.dumps({"results": rows}))
    assert command.main(["compare", str(tmp_path / "kernel"), str(tmp_path / "other")]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == ["only in first: double, kernel", "only in second: double, other"]
    (tmp_path / "old").write_text(json.dumps({"results": [{"case": "x", "seconds": 1}]}))
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path / "kernel"), str(tmp_path / "old")])
    assert "not written by" in capsys.readouterr().err


def test_the_run_command_writes_what_compare_reads(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "all_cases", lambda: [case(Double(0.001))])
    out = tmp_path / "run.json"
    assert command.main(["run", "--quick", "--device", "cpu", "--json", str(out)]) == 0
    assert suite.load(out).keys() == {("double: of nothing", "loop"), ("double: of nothing", "kernel")}
    assert len(out.read_text().splitlines()) < 40  # one line for each row
    monkeypatch.setattr(suite, "all_cases", lambda: [case(Double(0.001, value=2.0))])
    assert command.main(["run", "--device", "cpu", "--rounds", "2"]) == 1


# ----------------------------------------------------------------------------- measuring


def test_providers_take_turns_and_longer_calls_take_longer() -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float) -> measure.Run:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    runs = {"short": sleeper("short", 1e-3), "long": sleeper("long", 2e-2)}
    found = measure.interleaved(runs, CPU, seconds=0.05, rounds=3)
    turns = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert turns == ["short", "long"] * 3
    short, long = (sorted(found[name]) for name in ("short", "long"))
    assert len(short) == len(long) == 3 and long[1] > 3 * short[1] > 3e-3


def test_peaks_are_seen() -> None:
    def run() -> None:
        torch.zeros(16 << 20, dtype=torch.uint8).fill_(1)

    assert 14e6 < measure.peak_growth(run, CPU)[0] < 40e6


# ----------------------------------------------------------------------------- tuning


def test_tuning_rewrites_the_table_of_this_capability() -> None:
    large, small, wide = attention.CUDA_SHAPES[0], attention.CUDA_SHAPES[1], attention.CUDA_SHAPES[3]

    def rows(**seconds: float) -> list[dict[str, Any]]:
        wrong = {"name": "flash", "wrong": "differs by 1"}
        return [wrong, {"name": "dense", "seconds": 1e-9}, *({"name": n, "seconds": s} for n, s in seconds.items())]

    measured = {
        large: rows(triton=2.0, cudnn=1.0), small: rows(triton=1.0, cudnn=2.0), wide: rows(xformers=1.0, sdpa=2.0)
    }  # fmt: skip
    before = attention.TABLE.read_text()
    after = attention.tuned(before, 90, measured)
    entries = {(90, 64): {0: "triton", 1024: "triton", 4096: "cudnn"}, (90, 128): {0: "xformers", 4096: "xformers"}}
    assert f"FASTEST: dict[tuple[int, int], dict[int, Impl]] = {entries}\n" in after
    changed = [a for a, b in zip(after.splitlines(), before.splitlines(), strict=True) if a != b]
    assert len(changed) == 1
    again = attention.tuned(after, 89, {small: rows(triton=1.0)})
    assert str(entries)[:-1] not in again and str(entries)[1:-1] in again and "(89, 64): {0: 'triton'" in again
    assert command.main(["list"]) == 0
    with pytest.raises(SystemExit):
        command.main(["tune"])
