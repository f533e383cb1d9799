"""Labels reach the profiler."""

import torch

from tiledcore.utils import label, labelled


def test_labels_nest_and_leave_no_trace_on_the_object() -> None:
    linear = torch.nn.Linear(2, 2)
    with torch.profiler.profile() as profiler, labelled(linear, "forward", "network"), label("step"):
        linear(torch.ones(1, 2))
    counts = {e.key: e.count for e in profiler.key_averages() if e.key.startswith("tiledcore::")}
    assert counts == {"tiledcore::network": 1, "tiledcore::step": 1}
    assert "forward" not in vars(linear)
