"""Describe the modules of a model by their configurations: built-in name, folder or open pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tiledcore._diffusers import uncompiled
from tiledcore.models import EARTH, EARTH_FLUX, EMBEDDED

NETWORKS = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel")
"""Network classes whose memory :mod:`tiledcore.memory.prediction` can predict."""


@dataclass(frozen=True)
class Part:
    """One module of a pipeline."""

    role: str
    """Its name in the pipeline, such as ``"text_encoder_2"``."""
    kind: str
    """Its class in diffusers or transformers."""
    config: Mapping[str, Any]
    dtype: torch.dtype
    weight_bytes: int | None = None
    """Bytes of the real module (with adapters, quantised); None: computed from the configuration."""

    def make(self) -> torch.nn.Module:
        """Build the module, with weights of the default dtype."""
        import diffusers
        import transformers

        if self.role.startswith("text_encoder"):
            cls = getattr(transformers, self.kind)
            return cls(cls.config_class(**self.config))
        return getattr(diffusers, self.kind).from_config(dict(self.config))


@dataclass(frozen=True)
class Architecture:
    """The modules of a model that use memory, and how its pipeline calls them."""

    name: str
    network: Part
    vae: Part
    text_encoders: tuple[Part, ...]
    native: int | tuple[int, int]
    """Size of the training images in latent pixels: one side or (y, x)."""
    text_tokens: int
    long_text: int
    """Tokens for a text encoder that has no maximum length (T5)."""
    branches: int
    """2 with classifier-free guidance, else 1."""
    upcasts_vae: bool = False
    """Whether the pipeline decodes in float32 if the VAE is in float16."""

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.text_encoders, self.network, self.vae)


def architecture(model: Any, dtype: torch.dtype | None = None) -> Architecture:
    """The modules of a model.

    Args:
        model: a name from :data:`BUILT_IN`, a folder in diffusers' format (weights are not read), or a pipeline.
        dtype: of the weights; None: float16, or the pipeline's own.

    Raises:
        ValueError: there is no such model, or its folder lacks a configuration.
        TypeError: the memory of its classes cannot be predicted.
    """
    if not isinstance(model, str | Path):
        return _of_pipeline(model, dtype)
    if str(model) in _CONFIGURATIONS:
        pipeline, parts = _CONFIGURATIONS[str(model)]
        return _assemble(str(model), pipeline, _parts(parts, dtype or torch.float16))
    folder = EMBEDDED.get(str(model), Path(model))
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model={str(model)!r}: must be one of {', '.join(BUILT_IN)}, or a folder with model_index.json"
        )
    return _of_folder(str(model), folder, dtype or torch.float16)


def _of_folder(name: str, folder: Path, dtype: torch.dtype) -> Architecture:
    index = _json(folder / "model_index.json")
    parts: dict[str, tuple[str, dict[str, Any]]] = {}
    for role, entry in index.items():
        if not isinstance(entry, list) or entry[1] is None:
            continue
        if role in ("unet", "transformer", "vae") or role.startswith("text_encoder"):
            # The embedded transformer shares the other model's autoencoder.
            home = EARTH if folder == EARTH_FLUX and role == "vae" else folder
            parts[role] = (entry[1], _json(home / role / "config.json"))
    return _assemble(name, str(index.get("_class_name")), _parts(parts, dtype))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


def _parts(configurations: Mapping[str, tuple[str, dict[str, Any]]], dtype: torch.dtype) -> list[Part]:
    return [Part(role, kind, config, dtype) for role, (kind, config) in configurations.items()]


def _of_pipeline(pipe: Any, dtype: torch.dtype | None) -> Architecture:
    parts = []
    for role in ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae"):
        module = uncompiled(getattr(pipe, role, None))
        if module is None:
            continue
        config = module.config.to_dict() if role.startswith("text_encoder") else dict(module.config)
        size = tensor_bytes(module) if dtype is None else None
        parts.append(Part(role, type(module).__name__, config, dtype or module.dtype, size))
    found = _assemble(type(pipe).__name__, type(pipe).__name__, parts)
    native = getattr(pipe, "default_sample_size", None) if found.network.role == "transformer" else None
    return found if native is None else replace(found, native=native)


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _assemble(name: str, pipeline: str, parts: list[Part]) -> Architecture:
    roles = {part.role: part for part in parts}
    network = roles.get("unet") or roles.get("transformer")
    if network is None or network.kind not in NETWORKS:
        raise TypeError(
            f"model={name}: memory can be predicted for {', '.join(NETWORKS)}; found "
            f"{network.kind if network else 'neither a unet nor a transformer'}"
        )
    vae = roles.get("vae")
    if vae is None or "block_out_channels" not in vae.config:
        raise TypeError(
            f"model={name}: memory can be predicted for AutoencoderKL; found {vae.kind if vae else 'no vae'}"
        )
    native = network.config.get("sample_size")
    if network.kind == "FluxTransformer2DModel":
        native = 128  # what FluxPipeline sets
    if native is None:
        raise ValueError(f"model={name}: the network's configuration has no sample_size")
    encoders = tuple(part for part in parts if part.role.startswith("text_encoder"))
    return Architecture(
        name=name,
        network=network,
        vae=vae,
        text_encoders=encoders,
        native=native if isinstance(native, int) else (native[0], native[1]),
        text_tokens=_text_tokens(network.kind, encoders),
        long_text=256 if network.kind == "SD3Transformer2DModel" else 512,
        branches=1 if network.kind == "FluxTransformer2DModel" else 2,
        upcasts_vae=pipeline.startswith("StableDiffusionXL") and bool(vae.config.get("force_upcast", True)),
    )


def _text_tokens(kind: str, encoders: tuple[Part, ...]) -> int:
    """The number of text tokens for the network, with the pipelines' defaults."""
    if kind == "FluxTransformer2DModel":
        return 512
    clip = max((e.config.get("max_position_embeddings", 0) for e in encoders if e.kind.startswith("CLIP")), default=77)
    return clip + 256 if kind == "SD3Transformer2DModel" else clip


# Built-in configurations, from cards and papers: Rombach et al. 2022, Podell et al. 2023, Esser et al. 2024,
# Black Forest Labs 2024. What is missing has the default of its class.
_CLIP_L: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768, max_position_embeddings=77
)
_CLIP_G = _CLIP_L | dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
_CLIP_G |= dict(projection_dim=1280, hidden_act="gelu")
_T5_XXL = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
_SDXL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
_SD3 = dict(sample_size=128, num_layers=24, num_attention_heads=24, joint_attention_dim=4096)
_SD3 |= dict(caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192)


def _vae(latent_channels: int, **other: Any) -> tuple[str, dict[str, Any]]:
    levels = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    config = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=latent_channels)
    return "AutoencoderKL", config | levels | {"sample_size": 1024} | other


_WITHOUT_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
_CONFIGURATIONS: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]] = {
    "sd15": (
        "StableDiffusionPipeline",
        {
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "unet": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
            "vae": _vae(4, sample_size=512),
        },
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
            "unet": ("UNet2DConditionModel", _SDXL),
            "vae": _vae(4, force_upcast=True),
        },
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        {
            "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
            "text_encoder_3": ("T5EncoderModel", _T5_XXL),
            "transformer": ("SD3Transformer2DModel", _SD3),
            "vae": _vae(16, **_WITHOUT_QUANT),
        },
    ),
    "flux": (
        "FluxPipeline",
        {
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("T5EncoderModel", _T5_XXL),
            "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
            "vae": _vae(16, **_WITHOUT_QUANT),
        },
    ),
}
BUILT_IN = (*_CONFIGURATIONS, *EMBEDDED)
"""Names of the models whose configurations are here."""
