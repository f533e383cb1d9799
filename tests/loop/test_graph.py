"""StepGraphs: what is captured, replayed, dropped and refused, with a double in place of CUDA's graphs."""

import gc
import importlib
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import accelerate
import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.models.attention_processor import AttnProcessor
from graph_recorder import Recorder
from peft import LoraConfig
from runs import Double
from tiny import tiny_sd
from torch.utils._pytree import tree_leaves

from tiledcore._diffusers import acts_within
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


def test_the_least_recently_used_graph_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiledcore.loop.graph.KEYS", 2)
    graphs = StepGraphs(True, backend=Double())
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


class Stream:
    """A double of a CUDA stream."""

    device = torch.device("cuda", 0)


class Graph:
    """A double of torch's graph; ``fails``: its capture cannot be ended. A pool is the first graph that used it."""

    fails = False
    made: ClassVar[list["Graph"]] = []

    def __init__(self) -> None:
        self.used: Any = None
        self.was_reset = False
        Graph.made.append(self)

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        self.used = pool

    def capture_end(self) -> None:
        if self.fails:
            raise RuntimeError("capture_end\ndetails")

    def pool(self) -> Any:
        return self.used or id(self)

    def reset(self) -> None:
        self.was_reset = True

    def replay(self) -> None:
        return None


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The real ``torch.cuda.graph`` with doubles of streams and graphs; the list's last stream is the current one."""
    found: list[Any] = [Stream()]
    for name, value in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": lambda *_: found[-1],
        "set_stream": found.append,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "is_initialized": lambda: True,
        "_get_device_index": lambda *_, **__: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    monkeypatch.setattr(CudaBackend, "broken", None)
    monkeypatch.setattr(Graph, "made", [])
    return found


def test_a_failed_capture_puts_the_stream_back(streams: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "fails", True)
    main = streams[-1]
    with pytest.raises(RuntimeError, match="capture_end"):
        CudaBackend().capture(lambda: None)
    assert len(streams) == 3 and streams[1] is not main and streams[2] is main  # to the side and back
    assert Graph.made[0].was_reset
    # No other pipeline of the process tries again.
    graphs = StepGraphs("auto", backend=CudaBackend())
    assert run(graphs, 4) == [0, 1, 2, 3] and len(Graph.made) == 1
    assert graphs.counters.reason == "the step cannot be captured: capture_end"


def test_graphs_share_the_pool_of_one_that_lives(streams: list[Any]) -> None:
    """torch refuses a pool whose graphs are all gone."""
    backend = CudaBackend()
    first = backend.capture(lambda: None)
    second = backend.capture(lambda: None)
    assert [graph.used for graph in Graph.made] == [None, Graph.made[0].pool()]
    del first, second
    Graph.made.clear()
    gc.collect()
    backend.capture(lambda: None)
    assert Graph.made[0].used is None


def test_released_graphs_are_captured_again() -> None:
    graphs = StepGraphs("auto", backend=Double())
    assert run(graphs, 6) == [0, 1, 2, 2, 2, 2]
    graphs.release()
    assert run(graphs, 3) == [0, 0, 0]  # captured in its first step, and known to pay
    assert (graphs.counters.captures, graphs.counters.eager) == (2, 2)


def test_what_a_graph_reads_lives_as_long_as_it() -> None:
    class Table: ...

    graphs, table = StepGraphs(True, backend=Double()), Table()
    alive = weakref.ref(table)
    for _ in range(2):
        graphs.run(graphs.entry("a", dict), lambda: None, keeps=table)
    del table
    assert alive() is not None
    graphs.release()
    assert alive() is None


@pytest.mark.parametrize("name", ["patch_lists", "pieces"])
def test_lists_that_a_graph_reads_live_when_they_are_remembered_no_longer(name: str) -> None:
    """Kernels read lists of tokens on the device, of which only the last 64 are remembered."""
    module = "kernels.neighbor_attention_patches" if name == "patch_lists" else "ops.neighbor_attention"
    lists = getattr(importlib.import_module(f"tiledcore.{module}"), name)
    more = ((8, 8), (8, 8)) if name == "patch_lists" else (1 << 20,)

    def made(size: int) -> Any:
        return tree_leaves(lists((size, size), (8, 8), (4, 4), (False, False), *more, torch.device("cpu")))[0]

    graphs, alive = StepGraphs(True, backend=Recorder()), list[Any]()
    for _ in range(2):
        graphs.run(graphs.entry("a", dict), lambda: alive.append(weakref.ref(made(17))))
    for size in range(18, 82):
        made(size)
    gc.collect()
    assert alive[-1]() is not None
    graphs.release()
    gc.collect()
    assert alive[-1]() is None


def changes() -> list[Callable[[Any], Any]]:
    return [
        lambda pipe: pipe.unet.disable_adapters(),
        lambda pipe: pipe.set_adapters(["one"], [0.5]),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.unet.train(),
        lambda pipe: vars(pipe.unet.mid_block).update(forward=lambda *_, **__: None),  # as DeepCache does
        lambda pipe: setattr(pipe.unet.mid_block, "__class__", type(pipe.unet.down_blocks[0])),  # as ToMe does
    ]


@pytest.mark.parametrize("change", changes())
def test_what_a_graph_bakes_in_belongs_to_its_key(change: Callable[[Any], Any]) -> None:
    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="one")
    before = identity(pipe.unet)
    assert identity(pipe.unet) == before
    change(pipe)
    assert identity(pipe.unet) != before


def group_offloaded(unet: Any) -> Any:
    unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    return unet


def layerwise_cast(unet: Any) -> Any:
    unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    return unet


def sequentially_offloaded(unet: Any) -> Any:
    return accelerate.cpu_offload(unet, torch.device("cpu"))


def hooked(unet: Any) -> Any:
    unet.mid_block.register_forward_hook(lambda *_: None)
    return unet


def compiled_in_place(unet: Any) -> Any:
    unet.compile(mode="reduce-overhead")
    return unet


def compiled(unet: Any) -> Any:
    return torch.compile(unet, mode="reduce-overhead")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (group_offloaded, "offload"),
        (layerwise_cast, "casts"),
        (sequentially_offloaded, "offload"),
        (hooked, "hook"),
        (compiled, "reduce-overhead"),
        (compiled_in_place, "reduce-overhead"),
    ],
)
def test_what_acts_within_a_network_is_refused(change: Callable[[Any], Any], reason: str) -> None:
    unet = tiny_sd().unet
    HookRegistry.check_if_exists_or_initialize(unet)  # an empty list of hooks, as pipelines leave it
    assert acts_within(unet) is None
    assert reason in str(acts_within(change(unet)))


def test_a_compiled_network_can_be_captured() -> None:
    assert acts_within(torch.compile(tiny_sd().unet)) is None
