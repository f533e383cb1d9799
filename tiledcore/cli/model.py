"""The model of a command: the sizes that it can make, and how it is opened."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiledcore.cli.console import DTYPES, SCHEDULERS, say
from tiledcore.models import EMBEDDED

if TYPE_CHECKING:
    from tiledcore.config import TilingConfig
    from tiledcore.geometry import Pair
    from tiledcore.pipeline import TiledPipeline

# Their pipelines pack 2x2 latent pixels into a token; the configuration does not say so.
PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
# Options that decide how tiles meet, named as in TilingConfig.
MEET = ("mode", "overlap", "window", "ramp", "motion", "halo")
# What a model was trained with, so that its scheduler must support it.
CONVENTIONS = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")


def unit_of(model: str) -> int:
    """What each side of an image must be a multiple of, px: the VAE's factor times the side of a token.

    As far as files on this machine say it, without torch; what is wrong with them is found when the model is opened.
    """
    network = _read(model, "transformer") or _read(model, "unet")
    vae = _read("earth" if model in EMBEDDED else model, "vae")
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")  # AutoencoderDC has the second
    patches = network.get("all_patch_size") or [1]  # of Z-Image
    side = 2 if network.get("_class_name") in PACKED else network.get("patch_size") or patches[0]
    return side * (2 ** (len(levels) - 1) if levels else 8)


def _read(model: str, part: str) -> dict[str, Any]:
    """The configuration of a part of a model, from its folder or from the cache of the hub; {} if it is in neither."""
    path: Any = EMBEDDED.get(model, Path(model)) / part / "config.json"
    try:
        if not path.is_file():
            from huggingface_hub import try_to_load_from_cache

            path = Path(try_to_load_from_cache(model, f"{part}/config.json"))  # type: ignore[arg-type]
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        return {}


def check_size(size: Pair, unit: int) -> None:
    """Refuse a size (width, height) in px that the model cannot make; names the nearest ones."""
    below = [max(unit, side // unit * unit) for side in size]
    above = [-(-side // unit) * unit for side in size]
    if above != list(size):
        raise ValueError(
            f"--size {size[0]}x{size[1]}: each side must be a multiple of {unit} px, such as "
            f"{below[0]}x{below[1]} or {above[0]}x{above[1]}"
        )


def open_pipeline(args: argparse.Namespace, seed: int) -> TiledPipeline:
    """The model on its device, with the tiling and scheduler that were asked for."""
    import diffusers
    import torch

    from tiledcore.config import Execution, TilingConfig
    from tiledcore.memory.prediction import parse_bytes
    from tiledcore.pipeline import TiledPipeline

    _config(args, seed, TilingConfig())  # its errors come before the model is loaded
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = args.device.partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(f"--device {args.device}: torch sees {count} CUDA devices; use --device cpu")
    args.dtype = args.dtype or default_dtype(kind)
    limit = None if args.budget is None else parse_bytes(args.budget)
    dtype = getattr(torch, DTYPES[args.dtype])
    try:
        pipe = TiledPipeline.from_pretrained(args.model, torch_dtype=dtype, memory_budget=limit)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a folder may be damaged in any way
        raise ValueError(f"--model {args.model}: {_why_not_opened(args.model, error)}") from error
    pipe.execution = Execution(tile_batch=args.tile_batch)
    pipe.tiling = _config(args, seed, pipe.tiling)
    if args.scheduler is not None:
        scheduler, config = getattr(diffusers, SCHEDULERS[args.scheduler]), pipe.scheduler.config
        pipe.scheduler = scheduler.from_config(config)
        known = inspect.signature(scheduler.__init__).parameters
        if lost := [f"{k}={config[k]}" for k in CONVENTIONS if config.get(k) and k not in known]:
            say(f"--scheduler {args.scheduler} does not support the model's {', '.join(lost)}")
    return pipe.to(args.device)


def _config(args: argparse.Namespace, seed: int, default: TilingConfig) -> TilingConfig:
    """The tiling that was asked for; without any option of how tiles meet, ``default`` says how."""
    from tiledcore.config import Motion, TilingConfig

    given = {name: value for name in MEET if (value := getattr(args, name)) is not None}
    wrap = ("y" in args.wrap, "x" in args.wrap)
    base = TilingConfig() if given else default
    config = replace(base, tile=args.tile, wrap=wrap, **given)
    return replace(config, motion=Motion(seed=seed)) if config.motion == "moving" else config


def default_dtype(device: str) -> str:
    """fp16 on CUDA. On a CPU bf16 if it computes in it, which is about 1.5 times as fast as fp32; otherwise fp32."""
    import torch

    if device == "cuda":
        return "fp16"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, bool)() for probe in probes) else "fp32"


def _why_not_opened(model: str, error: BaseException) -> str:
    """Why ``from_pretrained`` failed, without the libraries' advice to run code from the checkpoint."""
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
    if model in EMBEDDED or Path(model).is_dir():
        return f"cannot be opened: {reason}"
    return f"no such folder, and it cannot be had from the Hugging Face hub: {reason}"
