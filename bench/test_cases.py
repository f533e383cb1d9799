"""The suite's cases through pytest-benchmark: `pytest bench/ [--benchmark-only ...]`; each is checked first.

pytest-benchmark times on a CPU; on a GPU use `python -m bench run`, which times by events.
"""

from typing import Any

import pytest
import torch

from bench import suite
from bench.case import Case

CASES = [case for case in suite.all_cases() if case.quick]
PROVIDERS = ("native", "mean", "ramp")  # the op's own; `python -m bench run` also has what they are compared with


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_case(benchmark: Any, case: Case, provider: str) -> None:
    with torch.inference_mode():
        ready = case.prepare(torch.device("cpu"), torch.float32)
        if provider not in ready.runs:
            pytest.skip(ready.not_run.get(provider, f"{case.op} has no {provider}"))
        for name, error in ready.errors().items():
            assert error <= suite.ULPS * torch.finfo(torch.float32).eps, name
        benchmark.extra_info.update(bytes=ready.bytes[provider], flops=ready.flops)
        benchmark(ready.runs[provider])
