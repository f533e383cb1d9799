"""A tiny pipeline of any image class of diffusers, and arguments to call it: random weights, no download.

Components come from the types in the class' constructor and the sizes in :mod:`zoo_models`. A text encoder whose
tokenizer is not made by hand is left out: the call gets embeddings in place of a prompt.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from operator import attrgetter
from typing import Any, get_args
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny import TEXT_WIDTH, text_config, tiny_tokenizer
from tiny_transformers import SHIFT, _t5, _t5_tokenizer
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTextModelWithProjection
from zoo_calls import (
    CALLS,
    CLASS_CALLS,
    DIFFERENCES,
    PARTS,
    REFERENCES,
    SIMPLE,
    STUBS,
    TEXT,
    WITH_IMAGES,
)
from zoo_models import NETWORKS
from zoo_more import MORE_CALLS, MORE_DIFFERENCES, MORE_NETWORKS, MORE_PARTS, MORE_STUBS

NETWORKS |= MORE_NETWORKS
PARTS |= MORE_PARTS
STUBS |= MORE_STUBS
DIFFERENCES |= MORE_DIFFERENCES
CLASS_CALLS |= MORE_CALLS

NATIVE = 16
"""Side of the images that these networks are for, in latent pixels."""
XL = {
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,
    "use_linear_projection": True,
}
"""What SDXL's networks have beside those of Stable Diffusion."""


class CannotBuildError(Exception):
    """This class has a component that is not made here."""


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rows = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(rows).resize((width, height), Image.Resampling.BICUBIC)


def network_class(cls: type) -> str | None:
    """Name of the class of a pipeline's network."""
    types = cls._get_signature_types()  # type: ignore[attr-defined]
    found = [t for t in _each(types.get("transformer") or types.get("unet") or ())]
    return next((t.__name__ for t in found if t.__name__ in NETWORKS), found[0].__name__ if found else None)


def _each(types: Any) -> tuple[type, ...]:
    every = types if isinstance(types, tuple | list) else (types,)
    return tuple(t for one in every for t in (get_args(one) or (one,)) if isinstance(t, type))


def _is_setting(kinds: tuple[type, ...]) -> bool:
    return all(kind.__module__ == "builtins" for kind in kinds)


def build(cls: type, seed: int = 0) -> Any:
    """A tiny pipeline of a class, the same weights each time.

    Raises:
        CannotBuildError: names the component.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {}
        types = cls._get_signature_types()  # type: ignore[attr-defined]
        for name, kind in types.items():
            if not _is_setting(_each(kind)):
                parts[name] = _component(cls, name, _each(kind))
        settings = {"requires_safety_checker": False, "requires_aesthetics_score": False, "add_watermarker": False}
        takes = signature(cls.__init__).parameters
        vars(sys.modules[cls.__module__]).setdefault("OmniGenMultiModalProcessor", lambda *_, **__: None)
        pipe = cls(**parts, **{name: value for name, value in settings.items() if name in takes})
        network: Any = parts.get("transformer") or parts.get("unet")
        for part in (network, parts.get("controlnet")):
            for parameter in part.parameters() if part is not None else ():
                if not parameter.any():  # diffusers starts these with zeros
                    torch.nn.init.normal_(parameter, std=0.1)
    for name, stub in STUBS.get(cls.__name__, {}).items():
        owner, _, own = name.rpartition(".")
        held = attrgetter(owner)(pipe) if owner else pipe
        vars(held)[own] = stub
    network.native_size = NATIVE
    if hasattr(pipe, "default_sample_size"):
        pipe.default_sample_size = NATIVE
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _component(cls: type, name: str, kinds: tuple[type, ...]) -> Any:
    if (cls.__name__, name) in PARTS:
        return PARTS[cls.__name__, name]
    if name.endswith("scheduler"):
        return _scheduler(cls, kinds)
    if name.startswith("tokenizer"):
        text = {
            kind.__name__ for kind in _each(cls._get_signature_types().get(name.replace("tokenizer", "text_encoder")))
        }  # type: ignore[attr-defined]
        return tiny_tokenizer() if text & CLIP else _t5_tokenizer() if text & T5 else None
    if name.startswith("text_encoder"):
        return _text_encoder(cls, {kind.__name__ for kind in kinds})
    if name in ("safety_checker", "image_encoder", "watermark") or "feature_extractor" in name or "processor" in name:
        return CLIPImageProcessor() if name == "feature_extractor" else None
    for kind in kinds:
        if kind.__name__ in NETWORKS:
            return kind(**NETWORKS[kind.__name__] | _differences(cls, name, kind.__name__)).eval()  # type: ignore[attr-defined]
    if name in OPTIONAL or any(kind is type(None) for kind in kinds):
        return None
    raise CannotBuildError(f"{name}: {', '.join(kind.__name__ for kind in kinds)}")


CLIP, T5 = {"CLIPTextModel", "CLIPTextModelWithProjection"}, {"T5EncoderModel"}
OPTIONAL = ("pe", "pe_tokenizer", "prompt_enhancer_head", "processor", "vision_language_encoder")


def _scheduler(cls: type, kinds: tuple[type, ...]) -> Any:
    for word, kind in (("SanaSprint", diffusers.SCMScheduler), ("LatentConsistency", diffusers.LCMScheduler)):
        if word in cls.__name__:
            return kind()
    module = vars(sys.modules[cls.__module__])
    if "calculate_shift" in module or "compute_empirical_mu" in module:
        return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **SHIFT)
    for kind in kinds:
        if kind.__name__ != "KarrasDiffusionSchedulers" and hasattr(kind, "from_config"):
            options = {"steps_offset": 1} if kind.__name__ in ("DDIMScheduler", "PNDMScheduler") else {}
            return kind(**options)
    return diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)


def _text_encoder(cls: type, kinds: set[str]) -> Any:
    if kinds & T5:
        return _t5(2 * TEXT_WIDTH if "StableDiffusion3" in cls.__name__ else TEXT_WIDTH)
    if kinds & CLIP:
        pooled = "CLIPTextModelWithProjection" in kinds
        return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(text_config(tiny_tokenizer())).eval()
    return None


def _differences(cls: type, name: str, kind: str) -> dict[str, Any]:
    """Sizes that a pipeline's network has beside those of its class."""
    own = cls.__name__
    found: dict[str, Any] = {}
    if kind in ("UNet2DConditionModel", "ControlNetModel", "ControlNetUnionModel") and "XL" in own:
        found |= XL
    if "StableDiffusion3" in own and name == "vae":
        found["latent_channels"] = 16
    found |= DIFFERENCES.get((own, name), {})
    return found


# ----------------------------------------------------------------------------- the call


def factor_of(pipe: Any) -> int:
    """Image pixels per latent pixel."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "movq_scale_factor")
    return next((getattr(pipe, name) for name in names if hasattr(pipe, name)), 8)


def arguments(cls: type, pipe: Any, size: tuple[int, int], steps: int = 2, **more: Any) -> dict[str, Any]:
    """Arguments of a call for a canvas of ``size`` latent pixels; the result is latents.

    ``more`` replaces some; None leaves one out.
    """
    takes = signature(cls.__call__).parameters  # type: ignore[operator]
    factor = factor_of(pipe)
    height, width = size[0] * factor, size[1] * factor
    kind = network_class(cls) or ""
    if "HiDream" in cls.__name__:  # makes each image of its default area
        pipe.default_sample_size = math.ceil(math.sqrt(size[0] * size[1]))
    if "Kandinsky5" in cls.__name__:
        pipe.resolutions = [(width, height)]
    given: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        "use_resolution_binning": False,
        "clean_caption": False,
        "strength": 0.9,
        "_auto_resize": False,
        "max_area": height * width,  # FLUX Kontext makes its image of this size, of the shape of height and width
        "max_sequence_length": 16,
        "enable_prompt_rewrite": False,
        "use_kv_cache": False,
        "use_pe": False,
        "intermediate_timesteps": None,
    }
    references = REFERENCES.get(cls.__name__, ("image_reference",))
    images = ("image", "control_image", "image_reference", "input_images", "images", "mask_image", "control_mask")
    for i, name in enumerate(images):
        known = name in takes and any(word in cls.__name__ for word in WITH_IMAGES)
        required = known or (name in takes and takes[name].default is Parameter.empty)
        if required:
            given[name] = picture(*((width, height) if name not in references else (128, 128)), i)
            if "mask" in name:
                given[name] = given[name].convert("L").point(lambda v: 255 * (v > 127))
    given |= {"prompt": "a coast", "guidance_scale": 3.0} if kind in SIMPLE else CALLS.get(kind, TEXT)
    if kind not in SIMPLE:
        given |= {"guidance_scale": 3.0, "true_cfg_scale": 3.0, "prompt": None, "negative_prompt": None}
    given |= CLASS_CALLS.get(cls.__name__, {}) | more
    allowed = {n: v(height, width) if callable(v) else v for n, v in given.items() if n in takes}
    return {n: v for n, v in allowed.items() if v is not None or n in ("prompt", "negative_prompt", *CLASS_CALLS)}


@contextmanager
def small_references(cls: type, area: int) -> Iterator[None]:
    """Qwen-Image Edit enlarges images to 1024x1024 px: here to ``area`` px."""
    module = sys.modules[cls.__module__]
    own = getattr(module, "calculate_dimensions", None)
    if own is None:
        yield
        return
    with patch.object(module, "calculate_dimensions", lambda _, ratio: own(area, ratio)):
        yield


def run(pipe: Any, cls: type, size: tuple[int, int], steps: int = 2, **more: Any) -> Tensor:
    """Latents of a call on a canvas of ``size`` latent pixels."""
    factor = factor_of(pipe)
    area = size[0] * size[1] * factor**2 if "Inpaint" in cls.__name__ or "LongCat" in cls.__name__ else 128 * 128
    with torch.no_grad(), torch.random.fork_rng(devices=[]), small_references(cls, area):
        torch.manual_seed(0)  # some pipelines draw without their generator
        result = pipe(**arguments(cls, pipe, size, steps, **more))
    images = result.images if hasattr(result, "images") else result.image if hasattr(result, "image") else result[0]
    if "JoyImageEditPlus" in cls.__name__:
        images = images[:, : size[0] * size[1] // 4]  # without references, which the pipeline puts back
    return images if isinstance(images, Tensor) else torch.as_tensor(np.stack([np.asarray(image) for image in images]))


def classes() -> list[type]:
    """All text-to-image, image-to-image, inpainting, edit and control pipelines of diffusers that denoise latents."""
    found = []
    for name in sorted(dir(diffusers)):
        if not name.endswith("Pipeline") or any(word in name for word in OTHERS):
            continue
        cls = getattr(diffusers, name)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
            continue
        types = cls._get_signature_types()
        takes = signature(cls.__call__).parameters
        if not takes.keys() & {"height", "image"}:
            continue  # makes one size only
        latent = types.keys() & {"transformer", "unet"} and types.keys() & {"vae", "movq", "vqvae"}
        if latent and not cls._load_connected_pipes:
            found.append(cls)
    return found


OTHERS = (
    *("Video", "Audio", "Music", "AnimateDiff", "PIA", "Wan", "LTX", "Mochi", "Allegro", "Latte", "SkyReels", "Helios"),
    *("EasyAnimate", "T2V", "I2V", "V2V", "World", "AceStep", "AnyFlow", "ShapE", "Lucy", "ChronoEdit", "ConsisID"),
    *("Marigold", "Proteina", "Modular", "Cosmos2_5", "Cosmos3", "Kandinsky6SR", "SanaWM", "LEditsPP", "Upscale"),
    "SuperResolution",
)
"""Words in the names of pipelines that make no image from noise: video, sound, depth."""
