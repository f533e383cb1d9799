"""What a model's folder says about it, read and checked before torch is imported and anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiledcore.cli.console import CommandError
from tiledcore.models import EARTH, EMBEDDED

Pair = tuple[int, int]

VAE_FACTOR = 8  # of nearly all autoencoders
# Their pipelines pack 2x2 latent pixels into a token; the configuration does not say so.
PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
INPAINTED_CHANNELS = (4, 9)
"""Of the UNets that diffusers' inpainting pipelines take."""


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is loaded; of a hub model that is not in the cache only its name."""

    name: str
    unit: int = VAE_FACTOR
    """Image pixels of which each side of an image must be a multiple."""
    native: Pair | None = None
    """(height, width) that the network was trained at, in latent pixels, where its configuration says so."""
    pipeline: str | None = None  # class in diffusers
    network: str | None = None  # class in diffusers
    channels: int | None = None  # that the network takes


def read_model(name: str) -> Model:
    """Read the configuration files of an embedded model, a folder, or a model on the hub.

    Raises:
        CommandError: it is none, or cannot be tiled.
    """
    folder = _folder(name)
    if folder is None:
        return Model(name)
    index = _json(folder / "model_index.json")
    if index is None:
        raise CommandError(f"--model {name}: there is no model_index.json in {folder}")
    role = next((role for role in ("unet", "transformer") if role in index), None)
    if role is None:
        raise CommandError(f"--model {name}: has neither a UNet nor a transformer, and cannot be tiled")
    pipeline = index.get("_class_name")
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
    network = str(config.get("_class_name"))
    size = config.get("sample_size")
    if role == "unet" and size is None:
        raise CommandError(f"--model {name}: its UNet names no native size (sample_size), and cannot be tiled")
    try:
        if not isinstance(size, int | list | None):
            raise TypeError(f"sample_size={size!r}")
        height, width = size if isinstance(size, list) else (size or 0, size or 0)
        native = None if size is None else (int(height), int(width))
        unit = unit_of(network, config, vae)
    except (TypeError, ValueError, LookupError) as error:
        raise CommandError(f"--model {name}: its configuration is damaged: {error}") from error
    return Model(name, unit, native, pipeline, network, config.get("in_channels"))


def unit_of(network: str, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """The VAE's factor times the side of a token, from the class and configuration of a network, and of a VAE.

    Each side of an image must be a multiple of it, in px.
    """
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
    import inspect

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
        optional = key is not None and "ControlNet" not in model.pipeline
        if not optional and "init_image" not in given:
            raise CommandError(f"--model {model.name}: {model.pipeline} starts from an image; give --init-image")
        return
    for option, mapping in (
        ("mask", auto.AUTO_INPAINT_PIPELINES_MAPPING),
        ("init_image", auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
        ("stages", auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
    ):
        if option in given and key not in mapping:
            shown = option.replace("_", "-")
            raise CommandError(f"--{shown}: diffusers has no pipeline for it that goes with {model.pipeline}")


def _folder(name: str) -> Path | None:
    """Where the configuration files of a model are: of a hub model, in the cache; None: not on this machine."""
    folder = EMBEDDED.get(name, Path(name))
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise CommandError(f"--model {name}: no such folder, and no name on the hub either")
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(name, "model_index.json")
    except ValueError:  # no valid name; from_pretrained says why
        return None
    return Path(index).parent if isinstance(index, str) else None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
