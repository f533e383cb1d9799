"""Labels reach the profiler, and the command says where the time went."""

import pytest
import torch

from tiledcore.cli import main as cli
from tiledcore.utils import label, labelled


def test_labels_nest_and_leave_no_trace_on_the_object() -> None:
    linear = torch.nn.Linear(2, 2)
    with torch.profiler.profile() as profiler, labelled(linear, "forward", "network"), label("step"):
        linear(torch.ones(1, 2))
    counts = {e.key: e.count for e in profiler.key_averages() if e.key.startswith("tiledcore::")}
    assert counts == {"tiledcore::network": 1, "tiledcore::step": 1}
    assert "forward" not in vars(linear)


@pytest.mark.parametrize(
    ("mode", "parts"),
    [("tiles", {"gather": 6, "network": 6, "step": 2}), ("canvas", {"network": 2, "of it, attention": 20, "step": 2})],
)
def test_the_command_counts_every_part(mode: str, parts: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["profile", "relief map of ocean", "--size", "384x256", "--steps", "2", "--mode", mode]
    assert cli.main([*command, "--tile", "16", "--tile-batch", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    calls = {line[:22].strip(): int(line[22:29]) for line in lines[1:-1]}
    assert calls.pop("decode") == 1
    assert set(calls) == set(parts)
    assert calls["step"] == 2 and calls["network"] >= parts["network"]
    assert lines[-1].startswith("of the loop: network ")
