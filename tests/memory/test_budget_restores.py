"""A call within a memory budget leaves the pipeline as it was, also after an error."""

from typing import Any

import pytest
import torch
from tilings import RAMP
from tiny import tiny_sd

from tiledcore import Execution, TiledPipeline, TilingConfig
from tiledcore.memory.planner import Plan, _offloaded, within
from tiledcore.memory.prediction import Phase

OFFLOADING = Plan(
    model="tiny",
    size=(128, 128),
    budget=2**30,
    device="cpu",
    dtype="float32",
    tiling=TilingConfig(),
    execution=Execution(),
    offload=True,
    vae_band=None,
    vae_room=None,
    tiles=1,
    area_factor=1.0,
    phases=(Phase("network", 1, 1, ""),),
)
CALL: dict[str, Any] = {"height": 128, "width": 128, "num_inference_steps": 1, "output_type": "pt"}


def state(pipe: Any) -> dict[str, Any]:
    """What offload changes: attributes of the pipeline, and of each module its own attributes and its device."""
    found = {name: vars(pipe).get(name, "absent") for name in ("_all_hooks", "_offload_gpu_id", "_offload_device")}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found[name] = (type(part), sorted(vars(part)), part.device)
    return found


def budgeted(pipe: Any) -> TiledPipeline:
    """With a budget whose plan needs offload; the device to run on is the CPU, so that it works everywhere."""
    wrapped = TiledPipeline.from_pipe(pipe, tiling=RAMP, memory_budget="1GiB")
    wrapped._budget.plan = lambda *_: OFFLOADING
    return wrapped


def run(pipe: Any, **more: Any) -> Any:
    return pipe("a coast", generator=torch.Generator().manual_seed(0), **CALL, **more).images


def test_offload_ends_with_the_call() -> None:
    pipe = tiny_sd()
    before = state(pipe)
    wrapped = budgeted(pipe)
    offloaded: list[bool] = []
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda *_: offloaded.append(_offloaded(pipe)))
    image = run(wrapped)
    handle.remove()
    assert offloaded and all(offloaded)
    assert state(pipe) == before
    assert torch.equal(image, run(TiledPipeline.from_pipe(pipe, tiling=OFFLOADING.tiling)))
    assert wrapped.report is not None and wrapped.report.plan is OFFLOADING


def test_offload_ends_with_an_error() -> None:
    pipe = tiny_sd()
    before = state(pipe)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(budgeted(pipe), callback_on_step_end=fail)
    assert state(pipe) == before
    assert torch.equal(run(pipe), run(tiny_sd()))


def test_offload_of_the_callers_own_stays() -> None:
    pipe = tiny_sd()
    pipe.enable_model_cpu_offload(device="cpu")
    hooks, before = pipe._all_hooks, state(pipe)
    with within(TiledPipeline.from_pipe(pipe), pipe, OFFLOADING):
        pass
    assert pipe._all_hooks is hooks and state(pipe) == before
