"""StepGraphs: what is captured, replayed, dropped and refused, with a double in place of CUDA's graphs."""

from collections.abc import Callable
from typing import Any

import pytest
from runs import Double

from tiledcore.loop.graph import Body, StepGraphs


def counting() -> tuple[list[int], Callable[[int], Body]]:
    """A log, and bodies that write their number into it."""
    log: list[int] = []
    return log, lambda i: lambda: log.append(i)


def run(graphs: StepGraphs, steps: int, key: Any = "a", refused: str | None = None) -> list[int]:
    log, body = counting()
    for i in range(steps):
        graphs.run(graphs.entry(key, dict), body(i), refused)
    assert len(log) == steps  # none is lost, none runs twice
    return log


def test_a_graph_that_pays_is_kept() -> None:
    graphs = StepGraphs("auto", backend=Double())
    # Steps 0 and 1 run eagerly, 2 is captured; from then on it is the captured body that runs.
    assert run(graphs, 6) == [0, 1, 2, 2, 2, 2]
    assert (graphs.counters.eager, graphs.counters.captures, graphs.counters.replays) == (2, 1, 4)
    assert graphs.counters.reason is None
    log, body = counting()
    graphs.run(graphs.entry("a", dict), body(0))
    assert log == [] and graphs.counters.replays == 5  # the next image replays from its first step on


def test_a_graph_that_does_not_pay_is_dropped() -> None:
    graphs = StepGraphs("auto", backend=Double(eager=1.0, replay=0.98))
    assert run(graphs, 7) == [0, 1, 2, 2, 4, 5, 6]
    assert (graphs.counters.eager, graphs.counters.captures, graphs.counters.replays) == (5, 1, 2)
    assert graphs.counters.reason == "replay gains 2.0%, and a graph is kept above 3%"


def test_a_graph_that_does_not_fit_is_dropped() -> None:
    graphs = StepGraphs("auto", backend=Double(free=1 << 20))
    assert run(graphs, 5) == [0, 1, 2, 3, 4]
    assert graphs.counters.reason is not None and "memory" in graphs.counters.reason


def test_a_step_that_cannot_be_captured_runs_eagerly() -> None:
    graphs = StepGraphs("auto", backend=Double(fails=True))
    assert run(graphs, 5) == [0, 1, 2, 3, 4]
    assert graphs.counters.captures == 0 and graphs.counters.eager == 5
    assert graphs.counters.reason == ("the step cannot be captured: operation not permitted when stream is capturing")


def test_graphs_on_demand_are_always_kept() -> None:
    graphs = StepGraphs(True, backend=Double(replay=2.0))
    assert run(graphs, 5) == [0, 1, 1, 1, 1]
    assert (graphs.counters.eager, graphs.counters.replays) == (1, 4)


@pytest.mark.parametrize(
    ("graphs", "refused", "message"),
    [
        (StepGraphs(True, backend=Double()), "CPU offload moves the weights", "cuda_graph=True: CPU offload"),
        (StepGraphs(True), None, "cuda_graph=True: there is no CUDA device"),
        (StepGraphs(True, backend=Double(fails=True)), None, "cuda_graph=True: the step cannot be captured"),
    ],
)
def test_what_was_demanded_is_never_silently_left_out(graphs: StepGraphs, refused: str | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(graphs, 2, refused=refused)


@pytest.mark.parametrize(
    ("graphs", "refused", "reason"),
    [
        (StepGraphs("auto", backend=Double()), "a callback", "a callback"),
        (StepGraphs("auto"), None, "there is no CUDA device"),
        (StepGraphs(False, backend=Double()), None, "cuda_graph=False"),
    ],
)
def test_refusals_are_told_in_words(graphs: StepGraphs, refused: str | None, reason: str) -> None:
    assert run(graphs, 4, refused=refused) == [0, 1, 2, 3]
    assert graphs.counters.reason == reason and graphs.counters.eager == 4


def test_the_least_recently_used_graph_goes_first() -> None:
    graphs = StepGraphs(True, size=2, backend=Double())
    made = []

    def entry(key: str) -> Any:
        return graphs.entry(key, lambda: made.append(key))

    for key in "abacab":
        entry(key)
    assert made == ["a", "b", "c", "b"]


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="cuda_graph='always': must be 'auto', True or False"):
        StepGraphs("always")  # type: ignore[arg-type]
