"""The only file that uses private names of diffusers, accelerate and torch.compile, tested for pyproject's range."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.models import attention_processor as processors
from diffusers.models.embeddings import PatchEmbed as PatchEmbed
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor as FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0 as QwenDoubleStreamAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor as ZSingleStreamAttnProcessor
from torch import Tensor

from tiledcore.utils import replaced

TEXT_MULTIPLE: int = SEQ_MULTI_OF  # Z-Image pads its text to a multiple of so many tokens

SELF = (  # of attention among image tokens
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.FusedAttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
)
CROSS = (*SELF, SanaAttnProcessor2_0)  # of attention of image tokens to text alone
JOINT = (processors.JointAttnProcessor2_0, processors.FusedJointAttnProcessor2_0, processors.XFormersJointAttnProcessor)
"""Of joint attention of image and text."""
ADDED = (  # text and image in one projection: such layers count as cross-attention, but see the whole image too
    processors.AttnAddedKVProcessor,
    processors.AttnAddedKVProcessor2_0,
    processors.SlicedAttnAddedKVProcessor,
    processors.XFormersAttnAddedKVProcessor,
)

FUSABLE = tuple(  # pipelines whose loop is: [repeat, scale], predict, [guide], step; others change the canvas between
    f"{name}{kind}Pipeline"
    for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")
    for kind in ("", "Img2Img")
)


def uncompiled(network: Any) -> Any:
    """The module inside of a compiled one; any other as it is."""
    return getattr(network, "_orig_mod", network)


def named(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a network, compiled or not, by name."""
    found = dict(signature(type(uncompiled(network)).forward).bind(None, *args, **kwargs).arguments)
    del found["self"]
    return found


def device_of(pipe: Any) -> torch.device:
    """Where a pipeline runs, offloaded or not."""
    return torch.device(pipe._execution_device)


def is_offloaded(module: Any) -> bool:
    """Whether accelerate moves the module's weights between calls."""
    return hasattr(module, "_hf_hook") or hasattr(uncompiled(module), "_hf_hook")


def acts_within(network: Any) -> str | None:
    """What acts between a network's layers and cannot be part of a CUDA graph, or None."""
    for module in network.modules():
        if has_hooks(module):
            return "a hook of the network's layers runs on the host: offload, casts, a cache or another"
        compiled = module if hasattr(module, "_orig_mod") else module._compiled_call_impl
        if compiled is not None and (compiled.get_compiler_config() or {}).get("triton.cudagraphs"):
            return "the network is compiled with CUDA graphs of its own (reduce-overhead)"
    return None


PER_CONTEXT = ("first_block_cache", "mag_cache", "taylorseer_cache")  # whose state is in a StateManager, by context


def stateful(network: Any) -> list[Any]:
    """What keeps values between a network's layers from call to call; a ValueError if tiles cannot each have one."""
    found = []
    for name, module in uncompiled(network).named_modules():
        processor = type(getattr(module, "processor", None))
        if processor.__module__.startswith("diffusers.pipelines."):
            raise ValueError(f"{name}: {processor.__name__} reads the attention of the whole canvas, which no tile has")
        found += [
            one for one in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values() if one._is_stateful
        ]
    for hook in found:
        if not type(hook).__module__.endswith(PER_CONTEXT):
            raise ValueError(
                f"enable_cache: different tiles would share the state of {type(hook).__name__}; call disable_cache(), "
                "or use FirstBlockCache, MagCache or TaylorSeer"
            )
    return found


@contextmanager
def context_of(hooks: list[Any], part: str) -> Iterator[None]:
    """A context of its own for one tile batch in what :func:`stateful` found; the pipeline's own is put back."""
    with ExitStack() as stack:
        for one in {one for hook in hooks for one in vars(hook).values() if isinstance(one, StateManager)}:
            now = one._context
            own = CacheContext(part) if now is None else replace(now, name=f"{now.name} {part}")
            stack.enter_context(replaced(one, _context=own))
        yield


def pack(pipe: Any, noise: Tensor) -> Tensor:
    """``[B, C, H, W]`` as the tokens that a pipeline of packed latents takes."""
    return pipe._pack_latents(noise, *noise.shape)


def share_settings(pipe: Any, other: Any) -> None:
    """Give a pipeline made from another one what the user has set on that, beside its components."""
    for name in ("_progress_bar_config", "_interrupt", "default_sample_size"):
        if name in vars(pipe):
            setattr(other, name, vars(pipe)[name])


def float32_parts(module: Any) -> tuple[str, ...]:
    """Names of layers that transformers loads in float32 whatever dtype is asked for."""
    return tuple(getattr(module, "_keep_in_fp32_modules", None) or ())


def is_hinted(pipe: Any) -> bool:
    """Whether a ControlNet or an adapter adds images to what the network computes."""
    return any(getattr(pipe, name, None) is not None for name in ("controlnet", "adapter"))


def places_of(scheduler: Any, timestep: Any) -> list[int]:
    """Where in a scheduler's timesteps this one is. One place if the pipeline told the scheduler where it begins."""
    told: int | None = getattr(scheduler, "begin_index", None)
    return (scheduler.timesteps == timestep).nonzero().flatten().tolist() if told is None else [told]


def stepless(scheduler: Any) -> Any:
    """A copy of a scheduler that looks every timestep up, whatever step the loop is at."""
    probe = copy.copy(scheduler)
    for name in ("_begin_index", "_step_index"):
        if hasattr(probe, name):
            setattr(probe, name, None)
    return probe


def has_hooks(module: Any) -> bool:
    """Whether anything runs before or after the module's forward, or replaced it."""
    others = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
    return hasattr(module, "_hf_hook") or bool(others or module._forward_hooks or module._forward_pre_hooks)


def offload_state(pipe: Any) -> dict[str, Any]:
    """The attributes of a pipeline that ``enable_model_cpu_offload`` changes, with their values now."""
    unset = {"_all_hooks": [], "_offload_gpu_id": 0, "_offload_device": None}
    return {name: getattr(pipe, name, value) for name, value in unset.items()}
