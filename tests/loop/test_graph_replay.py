"""A replayed step gives the bits of an eager one: recorded calls are repeated on the same tensors."""

from typing import Any

import diffusers
import pytest
import torch
from graph_recorder import Recorder
from peft import LoraConfig
from runs import quiet
from tilings import CANVAS, ONE, canvas_mode, moving
from tiny import tiny_sd
from tiny_transformers import NATIVE, build, call, tiny_flux
from torch import Tensor

from tiledcore import TiledPipeline, TilingConfig

SCHEDULERS = (
    *("DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "LCMScheduler"),
)


def pair(pipe: Any, tiling: TilingConfig) -> tuple[Any, Any]:
    """The pipeline without graphs, and with recorded ones."""
    eager = TiledPipeline.from_pipe(pipe, tiling=tiling, cuda_graph=False)
    graph = TiledPipeline.from_pipe(pipe, tiling=tiling, cuda_graph=True)
    graph._graphs.backend = Recorder()
    return eager, graph


def generate(wrapped: Any, steps: int = 4, **kwargs: Any) -> Tensor:
    arguments: dict[str, Any] = {"height": 160, "width": 256, "num_inference_steps": steps, **kwargs}
    generator = torch.Generator().manual_seed(0)
    result: Tensor = wrapped("a cat", generator=generator, output_type="latent", **arguments).images
    return result


def assert_replayed(eager: Any, graph: Any, **kwargs: Any) -> None:
    """Twice the same latents; the second call replays from its first step on, with other noise levels behind it."""
    expected = generate(eager, **kwargs)
    for _ in range(2):
        assert torch.equal(generate(graph, **kwargs), expected)
        assert graph.report.fused
    assert graph.report.graph.eager <= 1


def check(name: str, steps: int) -> None:
    pipe = quiet(tiny_sd())
    more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}  # its Runge-Kutta start needs four steps
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
    eager, graph = pair(pipe, ONE)
    assert_replayed(eager, graph, steps=steps)


@pytest.mark.parametrize("steps", [2, 3])
def test_noise_is_part_of_a_step_that_adds_none(steps: int) -> None:
    """LCM's last step adds no noise: with two steps it is the one that is captured."""
    check("LCMScheduler", steps)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_and_number_of_steps(name: str, steps: int) -> None:
    check(name, steps)


def test_canvas_mode() -> None:
    assert_replayed(*pair(quiet(tiny_sd()), CANVAS))


def test_canvas_mode_of_packed_latents() -> None:
    eager, graph = pair(build(tiny_flux), canvas_mode(tile=NATIVE))
    expected = call(eager, tiny_flux, (24, 32), num_inference_steps=4)
    for _ in range(2):
        assert torch.equal(call(graph, tiny_flux, (24, 32), num_inference_steps=4), expected)
    assert graph.report.graph.replays == 4


def test_tiles_that_go_round() -> None:
    assert_replayed(*pair(quiet(tiny_sd()), moving(tile=(10, 16), wrap=True)))


def test_tiles_of_one_size_in_some_steps_alone_are_not_captured() -> None:
    """Tiles that move on an open canvas sometimes lie on its regular grid; a graph of those steps fits no other."""
    eager, graph = pair(quiet(tiny_sd()), moving(tile=16))
    graph._graphs.mode = "auto"
    arguments: dict[str, Any] = {"height": 256, "width": 128, "steps": 24}  # of which three lie so
    assert torch.equal(generate(graph, **arguments), generate(eager, **arguments))
    assert graph.report.graph.captures == 0 and "differ from step to step" in graph.report.graph.reason


def test_changes_of_adapters_are_never_replayed_stale() -> None:
    pipe = quiet(tiny_sd())
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="one")
    eager, graph = pair(pipe, ONE)
    changes: list[Any] = [
        lambda: None,
        lambda: pipe.set_adapters(["one"], [0.5]),
        lambda: pipe.unet.disable_adapters(),
        lambda: pipe.unet.enable_adapters(),
        lambda: pipe.fuse_lora(),
    ]
    results = []
    for change in changes:
        change()
        results.append(generate(eager, steps=2))
        assert torch.equal(generate(graph, steps=2), results[-1])
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def test_prompts_of_another_length_have_a_graph_of_their_own() -> None:
    eager, graph = pair(quiet(tiny_sd()), ONE)
    random = torch.Generator().manual_seed(1)
    for length in (40, 12, 40):
        text = torch.randn(2, 1, length, 32, generator=random)
        arguments: dict[str, Any] = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
        arguments |= {"height": 160, "width": 256, "num_inference_steps": 3, "output_type": "latent"}
        one, other = (
            wrapped(generator=torch.Generator().manual_seed(0), **arguments).images for wrapped in (eager, graph)
        )
        assert torch.equal(one, other)
    assert graph.report.graph.replays == 3  # the first length's graph is still there


def test_a_network_with_hooks_is_never_captured() -> None:
    """What they do on the host would be missing in a replay."""
    pipe, seen = quiet(tiny_sd()), list[int]()
    pipe.unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    _, graph = pair(pipe, ONE)
    with pytest.raises(RuntimeError, match="cuda_graph=True: a hook of the network's layers runs on the host"):
        generate(graph)
    graph._graphs.mode = "auto"
    generate(graph)
    assert graph.report.graph.captures == 0 and "hook" in graph.report.graph.reason


@pytest.mark.slow
def test_with_a_budget_no_graph_of_another_size_lives_beside_a_step() -> None:
    graph: Any = TiledPipeline.from_pipe(quiet(tiny_sd()), tiling=ONE, cuda_graph=True, memory_budget="1GiB")
    graph._graphs.backend = Recorder()
    kept = []
    for width in (256, 192):
        generate(graph, steps=3, width=width)
        kept.append(sum(entry.replay is not None for entry in graph._graphs._entries.values()))
    assert kept == [1, 1] and graph.report.plan is not None


def test_graphs_are_dropped_before_an_image_is_decoded() -> None:
    _, graph = pair(quiet(tiny_sd()), ONE)
    generate(graph, steps=3)
    assert any(entry.replay for entry in graph._graphs._entries.values())
    graph("a cat", height=160, width=256, num_inference_steps=3, output_type="pt")
    assert not any(entry.replay for entry in graph._graphs._entries.values())
