"""Open the model of ``generate`` and ``profile``: its tiling, device, dtype and scheduler."""

from __future__ import annotations

import argparse
import re
import textwrap
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from tiledcore.cli.choices import DTYPES, SCHEDULERS
from tiledcore.cli.console import CommandError, say
from tiledcore.cli.model import check_classes
from tiledcore.models import EMBEDDED

if TYPE_CHECKING:
    from tiledcore.config import TilingConfig
    from tiledcore.pipeline import TiledPipeline

# What a model was trained with, so that its scheduler must support it.
CONVENTIONS = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")


def open_pipeline(args: argparse.Namespace, seed: int) -> TiledPipeline:
    """The model on its device, with the tiling and scheduler that were asked for.

    Raises:
        CommandError, ValueError: names the option, its value and what is valid.
    """
    import torch

    from tiledcore.config import Execution, TilingConfig
    from tiledcore.memory.prediction import parse_bytes
    from tiledcore.pipeline import TiledPipeline

    _config(args, seed, TilingConfig())  # its errors come before the model is loaded
    _settle_device(args)
    limit = None if args.budget is None else parse_bytes(args.budget)
    check_classes(args.known, vars(args))
    dtype = getattr(torch, DTYPES[args.dtype])
    try:
        pipe = TiledPipeline.from_pretrained(args.model, torch_dtype=dtype, memory_budget=limit)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a folder may be damaged in any way
        raise CommandError(f"--model {args.model}: {_why_not_opened(args.model, error)}") from error
    pipe.execution = Execution(tile_batch=args.tile_batch)
    pipe.tiling = _config(args, seed, pipe.tiling)
    if args.scheduler is not None:
        _set_scheduler(pipe, args.scheduler)
    return pipe.to(args.device)


def _config(args: argparse.Namespace, seed: int, default: TilingConfig) -> TilingConfig:
    """The tiling that was asked for; without any option of how tiles meet, ``default`` says how."""
    from tiledcore.config import Motion, TilingConfig

    meet = ("mode", "overlap", "window", "ramp", "motion", "halo")
    given = {name: value for name in meet if (value := getattr(args, name)) is not None}
    wrap = ("y" in args.wrap, "x" in args.wrap)
    base = TilingConfig() if given else default
    config = replace(base, tile=args.tile, wrap=wrap, **given)
    return replace(config, motion=Motion(seed=seed)) if config.motion == "moving" else config


def _settle_device(args: argparse.Namespace) -> None:
    """Choose the device and the dtype, where they were not asked for."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = args.device.partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise CommandError(f"--device {args.device}: torch sees {count} CUDA devices; use --device cpu")
    args.dtype = args.dtype or default_dtype(kind)


def default_dtype(device: str) -> str:
    """fp16 on CUDA. On a CPU bf16 if it computes in it, which is about 1.5 times as fast as fp32; otherwise fp32."""
    import torch

    if device == "cuda":
        return "fp16"
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(probe is not None and probe() for probe in probes) else "fp32"


def _why_not_opened(model: str, error: BaseException) -> str:
    """Why ``from_pretrained`` failed, without the libraries' advice to run code from the checkpoint."""
    from huggingface_hub.constants import is_offline_mode

    here = model in EMBEDDED or Path(model).is_dir()
    while error.__cause__ is not None:  # diffusers' own message is "see the stacktrace above"
        error = error.__cause__
    text = str(error)
    if "trust_remote_code" in text:
        return "needs code of its own, which is not run"
    if re.search(r"weights_only|pickle|PytorchStreamReader|Unable to load weights .*\.bin\b", text):
        return (
            "a file of its weights is a pickle (.bin) that is damaged or holds more than tensors. It is not opened, "
            "because a pickle can run any code. If you trust it, load it with diffusers and write it as safetensors "
            "with pipe.save_pretrained(FOLDER, safe_serialization=True)"
        )
    reason = f"{type(error).__name__}: {textwrap.shorten(text, 200, placeholder=' ...')}"
    if here:
        return f"cannot be opened: {reason}"
    missing = "no such folder, and it cannot be had from the Hugging Face hub"
    offline = "HF_HUB_OFFLINE allows only models that were downloaded before"
    return f"{missing}: {offline if is_offline_mode() else reason}"


def _set_scheduler(pipe: TiledPipeline, name: str) -> None:
    import diffusers

    scheduler, config = getattr(diffusers, SCHEDULERS[name]), pipe.scheduler.config
    pipe.scheduler = scheduler.from_config(config)
    known = signature(scheduler.__init__).parameters
    lost = [f"{k}={config[k]}" for k in CONVENTIONS if config.get(k) and k not in known]
    if lost:
        say(f"--scheduler {name} does not support the model's {', '.join(lost)}")
