"""The model of a command: what its folder says, checked before torch is imported, and how it is opened."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiledcore.cli.console import DTYPES, SCHEDULERS, CommandError, say
from tiledcore.models import EARTH, EMBEDDED

if TYPE_CHECKING:
    from tiledcore.config import TilingConfig
    from tiledcore.pipeline import TiledPipeline

Pair = tuple[int, int]

VAE_FACTOR = 8  # of nearly all autoencoders
# Their pipelines pack 2x2 latent pixels into a token; the configuration does not say so.
PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
INPAINTED_CHANNELS = (4, 9)
"""Of the UNets that diffusers' inpainting pipelines take."""
# Options that decide how tiles meet, named as in TilingConfig.
MEET = ("mode", "overlap", "window", "ramp", "motion", "halo")
# What a model was trained with, so that its scheduler must support it.
CONVENTIONS = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is loaded; of a hub model that is not in the cache only its name."""

    name: str
    unit: int = VAE_FACTOR  # Each side of an image must be a multiple of it, px
    native: Pair | None = None  # (height, width) that the network was trained at, latent pixels, where that is said
    pipeline: str | None = None  # Class in diffusers
    network: str | None = None  # Class in diffusers
    channels: int | None = None  # That the network takes


def read_model(name: str) -> Model:
    """Read the configuration files of an embedded model, a folder, or a model on the hub; refuse what is not tiled."""
    folder = _folder(name)
    if folder is None:
        return Model(name)
    index = _json(folder / "model_index.json")
    if index is None:
        raise CommandError(f"--model {name}: there is no model_index.json in {folder}")
    role, pipeline = "unet" if "unet" in index else "transformer", index.get("_class_name")
    if role not in index:
        raise CommandError(f"--model {name}: has neither a UNet nor a transformer, and cannot be tiled")
    if not isinstance(pipeline, str):
        raise CommandError(f"--model {name}: its pipeline is code of its own ({pipeline}); only diffusers' own are run")
    if "vae" not in index:
        raise CommandError(f"--model {name}: {pipeline} has no autoencoder (vae), and cannot be tiled")
    config = _json(folder / role / "config.json")
    vae = _json((EARTH if name in EMBEDDED else folder) / "vae" / "config.json")
    if config is None or vae is None:
        if name in EMBEDDED or Path(name).is_dir():
            raise CommandError(f"--model {name}: {'vae' if config else role}/config.json is not there or not JSON")
        return Model(name, pipeline=pipeline)
    network, size = str(config.get("_class_name")), config.get("sample_size")
    if role == "unet" and size is None:
        raise CommandError(f"--model {name}: its UNet names no native size (sample_size), and cannot be tiled")
    try:
        if not isinstance(size, int | list | None):
            raise TypeError(f"sample_size={size!r}")
        height, width = size if isinstance(size, list) else (size or 0, size or 0)
        native = None if size is None else (int(height), int(width))
        return Model(name, unit_of(network, config, vae), native, pipeline, network, config.get("in_channels"))
    except (TypeError, ValueError, LookupError) as error:
        raise CommandError(f"--model {name}: its configuration is damaged: {error}") from error


def unit_of(network: str, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """The VAE's factor times the side of a token, px: each side of an image must be a multiple of it."""
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")  # AutoencoderDC has the second
    factor = 2 ** (len(levels) - 1) if levels else VAE_FACTOR
    if network in PACKED:
        return int(2 * factor)
    patches = config.get("all_patch_size") or [1]  # of Z-Image
    return int(config.get("patch_size") or patches[0]) * factor


def check_size(size: Pair, unit: int) -> None:
    """Refuse a size (width, height) in px that the model cannot make; names the nearest ones."""
    below = [max(unit, side // unit * unit) for side in size]
    above = [-(-side // unit) * unit for side in size]
    if above != list(size):
        raise CommandError(
            f"--size {size[0]}x{size[1]}: each side must be a multiple of {unit} px, such as "
            f"{below[0]}x{below[1]} or {above[0]}x{above[1]}"
        )


def check_tile(tile: Pair | None, native: Pair) -> None:
    """Refuse tiles (height, width) so small that an image takes a hundred thousand of them and shows nothing."""
    least = [-(-side // 4) for side in native]
    if tile is not None and (tile[0] < least[0] or tile[1] < least[1]):
        raise CommandError(
            f"--tile {tile[0]}x{tile[1]}: at least {least[0]}x{least[1]} latent pixels, "
            f"a quarter of the model's own {native[0]}x{native[1]}"
        )


def check_classes(model: Model, options: Mapping[str, Any]) -> None:
    """Refuse what diffusers has no class for; ``options`` are those of the command. Loads nothing."""
    if model.pipeline is None:
        return
    import diffusers
    from diffusers.pipelines import auto_pipeline as auto

    cls = getattr(diffusers, model.pipeline, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise CommandError(
            f"--model {model.name}: diffusers {diffusers.__version__} has no pipeline {model.pipeline}, "
            "which its model_index.json names"
        )
    given = {name for name, value in options.items() if value is not None}
    key = next((key for key, found in auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items() if found is cls), None)
    if "image" in inspect.signature(cls.__call__).parameters:
        if (key is None or "ControlNet" in model.pipeline) and "init_image" not in given:
            raise CommandError(f"--model {model.name}: {model.pipeline} starts from an image; give --init-image")
        return
    for option, mapping in (
        ("mask", auto.AUTO_INPAINT_PIPELINES_MAPPING),
        ("init_image", auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
        ("stages", auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
    ):
        if option in given and key not in mapping:
            option = option.replace("_", "-")
            raise CommandError(f"--{option}: diffusers has no pipeline for it that goes with {model.pipeline}")


def _folder(name: str) -> Path | None:
    """Where the configuration files of a model are: of a hub model, in the cache; None: not on this machine."""
    folder = EMBEDDED.get(name, Path(name))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(name, "model_index.json")
    except ValueError as error:
        raise CommandError(f"--model {name}: no such folder, and no name on the hub either") from error
    return Path(index).parent if isinstance(index, str) else None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


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
        raise CommandError(f"--device {args.device}: torch sees {count} CUDA devices; use --device cpu")
    args.dtype = args.dtype or default_dtype(kind)
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
    from huggingface_hub.constants import is_offline_mode

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
    reason = "HF_HUB_OFFLINE allows only models that were downloaded before" if is_offline_mode() else reason
    return f"no such folder, and it cannot be had from the Hugging Face hub: {reason}"
