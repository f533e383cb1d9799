"""StepGraphs: what is captured, replayed, dropped and refused, with a double in place of CUDA's graphs."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from runs import Double
from tiny import tiny_sd

from tiledcore.loop.graph import Body, CudaBackend, StepGraphs, identity


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


def test_after_a_failed_capture_nothing_is_captured_again() -> None:
    double = Double(fails=True)
    graphs = StepGraphs("auto", backend=double)
    run(graphs, 4)
    double.fails = False
    assert run(graphs, 4, key="b") == [0, 1, 2, 3]
    assert graphs.counters.captures == 0 and "cannot be captured" in str(graphs.counters.reason)


def test_the_eager_retry_does_not_keep_the_failed_attempt_alive() -> None:
    """Tensors of the failed capture are gone when the step runs again."""

    class Failing(Double):
        def capture(self, body: Body) -> Body:
            held = torch.empty(4)
            alive.append(weakref.ref(held))
            raise RuntimeError("no")

    alive: list[Any] = []
    graphs, seen = StepGraphs("auto", backend=Failing()), []
    for _ in range(3):
        graphs.run(graphs.entry("a", dict), lambda: seen.append(bool(alive) and alive[0]() is None))
    assert seen == [False, False, True]


class Graph:
    """A double of torch's graph, whose end of capture fails."""

    def reset(self) -> None:
        return None


def test_a_failed_capture_puts_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[Any] = ["main"]

    @contextmanager
    def graph(_: Any, pool: Any) -> Iterator[None]:
        streams.append("side")
        yield
        raise RuntimeError("capture_end")

    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": object,
        "current_stream": lambda: streams[-1],
        "set_stream": streams.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    backend = CudaBackend()
    pool = backend.pool
    with pytest.raises(RuntimeError, match="capture_end"):
        backend.capture(lambda: None)
    assert streams == ["main", "side", "main"] and backend.pool is not pool


def changes() -> list[Callable[[Any], Any]]:
    return [
        lambda pipe: pipe.unet.disable_adapters(),
        lambda pipe: pipe.set_adapters(["one"], [0.5]),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.unet.train(),
    ]


@pytest.mark.parametrize("change", changes())
def test_what_a_graph_bakes_in_belongs_to_its_key(change: Callable[[Any], Any]) -> None:
    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="one")
    before = identity(pipe.unet)
    assert identity(pipe.unet) == before
    change(pipe)
    assert identity(pipe.unet) != before
