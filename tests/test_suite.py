"""The suite of benchmarks: what is wrong is not timed, what became slower is told, noise is not."""

import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_results import PEERS, SCALING

from bench import __main__ as command
from bench import comparison, report, suite, timing
from bench.case import Case, Ready, relative_error

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a test double says so: this machine may be busy with anything."""

    now = 0.0

    def sleeper(self, seconds: float, noise: float = 0.0) -> Callable[[], None]:
        rng = random.Random(0)

        def run() -> None:
            self.now += seconds * (1 + noise * rng.uniform(-1, 1))

        return run


CLOCK = Clock()
sleeper = CLOCK.sleeper


def double(kernel: Callable[[], Any], error: float = 0.0, name: str = "kernel") -> Case:
    """A case with a test double for a kernel."""

    def prepare(device: torch.device, dtype: torch.dtype) -> Ready:
        runs = {"loop": sleeper(0.004), name: kernel}
        return Ready(runs, "loop", {"loop": 1000, name: 1000}, 2000, lambda: {name: error}, {"gpu": "no GPU"})

    return Case("double", "of nothing", "itself", prepare, quick=True)


def results(case: Case, rounds: int = 8) -> dict[str, Any]:
    return suite.run([case], CPU, torch.float32, rounds, budget=5.0, say=lambda text: None)


@pytest.fixture(autouse=True)
def cheap_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e10}
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype, rounds=5: found)


@pytest.fixture(autouse=True)
def own_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.node.name:
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: CLOCK.now))


def test_rows_have_time_spread_and_share_of_the_ceiling() -> None:
    rows = {row["name"]: row for row in results(double(sleeper(0.002, 0.1)))["results"]}
    assert rows["kernel"]["seconds"] == pytest.approx(0.002, rel=0.1)
    assert rows["kernel"]["low"] < rows["kernel"]["seconds"] < rows["kernel"]["high"]
    assert rows["kernel"]["speedup"] == pytest.approx(rows["loop"]["seconds"] / rows["kernel"]["seconds"])
    assert rows["kernel"]["of_ceiling"] == pytest.approx(1e-6 / rows["kernel"]["seconds"])
    assert rows["loop"]["seconds"] == pytest.approx(0.004)
    assert rows["gpu"]["not_run"] == "no GPU" and "seconds" not in rows["gpu"]


@pytest.mark.parametrize("error", [1e-2, float("inf"), float("nan")])
def test_a_wrong_kernel_is_told_and_not_timed(error: float) -> None:
    found = results(double(sleeper(0.001), error))
    rows = {row["name"]: row for row in found["results"]}
    assert "wrong" in rows["kernel"] and "seconds" not in rows["kernel"]
    assert "seconds" in rows["loop"]
    assert "wrong" in suite.markdown(found)


def test_what_cannot_run_is_told_and_the_rest_goes_on() -> None:
    def fails() -> None:
        raise RuntimeError("no such kernel\nat line 1")

    rows = {row["name"]: row for row in results(double(fails))["results"]}
    assert rows["kernel"]["not_run"] == "RuntimeError: no such kernel" and "seconds" in rows["loop"]
    broken = Case("double", "broken", "itself", lambda device, dtype: fails(), quick=True)  # type: ignore[arg-type]
    found = suite.run([broken, double(sleeper(1.0))], CPU, torch.float32, 5, 5.0, say=lambda text: None)["results"]
    assert found[0]["wrong"] == "could not be run: RuntimeError: no such kernel"
    assert [row["name"] for row in found if "seconds" in row] == ["loop", "kernel"]


def test_relative_error() -> None:
    exact = torch.tensor([1.0, -4.0])
    assert relative_error(exact + torch.tensor([0.0, 0.4]), exact) == pytest.approx(0.1)
    assert relative_error(torch.tensor([float("nan"), 0.0]), exact) == float("inf")


def test_cases_are_chosen_by_parts_of_their_names() -> None:
    cases = suite.all_cases()
    assert {case.op for case in cases} == {"gather_tiles", "blend_tiles", "neighbor_attention", "fused_step"}
    assert len({case.name for case in cases}) == len(cases)
    assert {case.op for case in suite.chosen([], quick=True)} == {case.op for case in cases}
    assert {case.op for case in suite.chosen(["blend"], quick=True)} == {"blend_tiles"}
    with pytest.raises(ValueError, match="case='blur': in no name"):
        suite.chosen(["blur"], quick=False)


@pytest.mark.parametrize("op", ["gather_tiles", "blend_tiles", "neighbor_attention", "fused_step"])
def test_real_cases_agree_with_their_oracles(op: str) -> None:
    case = min((case for case in suite.all_cases() if case.op == op and case.quick), key=lambda case: len(case.name))
    with torch.inference_mode():
        ready = case.prepare(CPU, torch.float32)
        errors = ready.errors()
    assert errors and all(error <= suite.ULPS * torch.finfo(torch.float32).eps for error in errors.values())
    assert ready.baseline in ready.runs
    assert all(ready.bytes[name] > 0 for name in ready.runs)


# ----------------------------------------------------------------------------- compare


def fake(values: list[float], name: str = "kernel") -> dict[str, Any]:
    return {"results": [{"case": "double", "name": name, "samples": values}]}


def jitter(median: float, noise: float, seed: int, count: int = 40) -> list[float]:
    rng = random.Random(seed)
    return [median * (1 + noise * rng.uniform(-1, 1)) for _ in range(count)]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_a_slowed_kernel_is_caught_and_an_unchanged_one_is_not(noise: float) -> None:
    kernel = sleeper(0.004, noise)
    before, same = results(double(kernel)), results(double(kernel))
    slowed = results(double(lambda: (kernel(), kernel())))  # does its work twice
    verdicts = {c.name: c.verdict for c in comparison.compare([before], [slowed])[0]}
    assert verdicts["kernel"] == "slower" and verdicts["loop"] == "same"
    assert {c.verdict for c in comparison.compare([before], [same])[0]} == {"same"}
    assert {c.name: c.verdict for c in comparison.compare([slowed], [before])[0]}["kernel"] == "faster"


def test_a_really_slowed_kernel_is_caught() -> None:
    runs = [results(double(partial(time.sleep, seconds))) for seconds in (0.01, 0.05)]
    verdicts = {c.name: c.verdict for c in comparison.compare([runs[0]], [runs[1]])[0]}
    assert verdicts["kernel"] == "slower"


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
    (found,), only = comparison.compare([fake(jitter(1.0, noise, 0))], [fake(jitter(change, noise, 1))])
    assert found.verdict == verdict and not only


def test_noise_alone_is_never_told() -> None:
    for seed in range(200):
        noise = random.Random(seed).uniform(0, 0.4)
        (found,), _ = comparison.compare([fake(jitter(1, noise, 2 * seed))], [fake(jitter(1, noise, 2 * seed + 1))])
        assert found.verdict == "same", (seed, found)


def test_runs_that_differ_among_themselves_are_noise() -> None:
    drifting = [fake([1.0] * 10), fake([1.3] * 10)]
    (found,), _ = comparison.compare(drifting, [fake([1.3] * 10), fake([1.0] * 10)])
    assert found.noise > 0.2 and found.verdict == "same"


def test_what_one_side_lacks_is_listed() -> None:
    changes, only = comparison.compare([fake([1.0] * 5)], [fake([1.0] * 5, "other")])
    assert not changes
    assert only == ["only in first: double, kernel", "only in second: double, other"]


def test_compare_command_tells_by_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).write_text(json.dumps(fake(jitter(value, 0.01, 0))))
    assert command.main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "slower" in capsys.readouterr().out
    (tmp_path / "old").write_text(json.dumps({"results": [{"case": "x", "seconds": 1}]}))
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path / "a"), str(tmp_path / "old")])
    assert "not written by" in capsys.readouterr().err


def test_two_checkouts_run_in_the_order_a_b_b_a(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def run(arguments: list[str], cwd: Path, **_: Any) -> None:
        order.append(cwd.name)
        slow = 1.5 if cwd.name == "b" else 1.0
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(fake([slow] * 5)))

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(comparison.subprocess, "run", run)
    assert command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--quick"]) == 1
    assert order == ["a", "b", "b", "a"]


# ----------------------------------------------------------------------------- results and their page


def test_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    files = {"run": results(double(sleeper(0.001))), "scaling": SCALING, "peers": PEERS}
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    page = report.write(*(tmp_path / f"{name}.json" for name in files), tmp_path / "out")
    text = page.read_text()
    assert text.count('src="data:image/png;base64,') == 4 and "http" not in text
    assert "<td>tiledcore, shift</td>" in text and "double: of nothing" in text
    for name in ("roofline", "ceilings", "area", "peers"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_read_back_as_written(tmp_path: Path) -> None:
    found = results(double(sleeper(0.001)))
    (tmp_path / "run.json").write_text(suite.dumps(found))
    assert json.loads((tmp_path / "run.json").read_text()) == found
    assert comparison.load(tmp_path / "run.json")["results"][0]["case"] == "double: of nothing"


# ----------------------------------------------------------------------------- timing


def test_peaks_are_seen() -> None:
    def run() -> None:
        torch.zeros(16 << 20, dtype=torch.uint8).fill_(1)

    assert 14e6 < timing.peak_growth(run, CPU) < 40e6
    assert timing.exponent([1, 2, 4], [5, 10, 20]) == pytest.approx(1)


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    assert timing.repeats(run) == 1000 and timing.repeats(sleeper(0.003)) == 1 and timing.repeats(sleeper(3e-4)) == 4
    calls = 0
    timing.samples({"": run}, CPU, rounds=3, calls={"": 7})
    assert calls == 1 + 3 * (1 + 7)
    assert timing.copies(10, CPU) == 1
    rotated, how = timing.rotation([run, run], CPU)
    calls = 0
    rotated()
    assert calls == 2 and how == "eager"
