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
ROLES = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae")
Configurations = dict[str, tuple[str, dict[str, Any]]]
"""Role -> (class, its configuration)."""


@dataclass(frozen=True)
class Part:
    """One module of a pipeline."""

    role: str  # its name in the pipeline, such as "text_encoder_2"
    kind: str  # its class in diffusers or transformers
    config: Mapping[str, Any]
    dtype: torch.dtype
    weight_bytes: int | None = None  # of the real module (adapters, quantised); None: computed from the configuration

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
    native: int | tuple[int, int]  # size of the training images in latent pixels: one side or (y, x)
    text_tokens: int
    long_text: int  # tokens for a text encoder that has no maximum length (T5)
    branches: int  # 2 with classifier-free guidance, else 1
    upcasts_vae: bool = False  # whether the pipeline decodes in float32 if the VAE is in float16

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
    found = _CONFIGURATIONS.get(str(model)) or _of_folder(EMBEDDED.get(str(model), Path(model)))
    return _assemble(str(model), [Part(role, *part, dtype or torch.float16) for role, part in found.items()])


def _of_folder(folder: Path) -> Configurations:
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model={str(folder)!r}: must be one of {', '.join(BUILT_IN)}, or a folder with model_index.json"
        )
    found = {}
    for role, entry in _json(folder / "model_index.json").items():
        if role in ROLES and isinstance(entry, list) and entry[1] is not None:
            # The embedded transformer shares the other model's autoencoder.
            home = EARTH if folder == EARTH_FLUX and role == "vae" else folder
            found[role] = (entry[1], _json(home / role / "config.json"))
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


def _of_pipeline(pipe: Any, dtype: torch.dtype | None) -> Architecture:
    parts = []
    for role in ROLES:
        if (module := uncompiled(getattr(pipe, role, None))) is not None:
            config = module.config.to_dict() if role.startswith("text_encoder") else dict(module.config)
            size = tensor_bytes(module) if dtype is None else None
            parts.append(Part(role, type(module).__name__, config, dtype or module.dtype, size))
    found = _assemble(type(pipe).__name__, parts)
    native = getattr(pipe, "default_sample_size", None) if found.network.role == "transformer" else None
    return found if native is None else replace(found, native=native)


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _assemble(name: str, parts: list[Part]) -> Architecture:
    roles = {part.role: part for part in parts}
    network, vae = roles.get("unet") or roles.get("transformer"), roles.get("vae")
    if network is None or network.kind not in NETWORKS:
        kind = network.kind if network else "neither a unet nor a transformer"
        raise TypeError(f"model={name}: memory can be predicted for {', '.join(NETWORKS)}; found {kind}")
    if vae is None or "block_out_channels" not in vae.config:
        kind = vae.kind if vae else "no vae"
        raise TypeError(f"model={name}: memory can be predicted for AutoencoderKL; found {kind}")
    flux, sd3 = network.kind == "FluxTransformer2DModel", network.kind == "SD3Transformer2DModel"
    native = 128 if flux else network.config.get("sample_size")  # 128 is what FluxPipeline sets
    if native is None:
        raise ValueError(f"model={name}: the network's configuration has no sample_size")
    encoders = tuple(part for part in parts if part.role.startswith("text_encoder"))
    lengths = [part.config.get("max_position_embeddings", 0) for part in encoders if part.kind.startswith("CLIP")]
    text_tokens = 512 if flux else max(lengths, default=77) + 256 * sd3
    long_text, branches = 256 if sd3 else 512, 1 if flux else 2
    # SDXL's pipelines, whose networks have this kind of embedding, do so unless the VAE says no.
    upcasts = network.config.get("addition_embed_type") == "text_time" and bool(vae.config.get("force_upcast", True))
    native = native if isinstance(native, int) else (native[0], native[1])
    return Architecture(name, network, vae, encoders, native, text_tokens, long_text, branches, upcasts)


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


_KL: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=1024,
)
_KL16 = _KL | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
_CONFIGURATIONS: dict[str, Configurations] = {
    "sd15": {
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "unet": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
        "vae": ("AutoencoderKL", _KL | {"sample_size": 512}),
    },
    "sdxl": {
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        "unet": ("UNet2DConditionModel", _SDXL),
        "vae": ("AutoencoderKL", _KL),
    },
    "sd3": {
        "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        "text_encoder_3": ("T5EncoderModel", _T5_XXL),
        "transformer": ("SD3Transformer2DModel", _SD3),
        "vae": ("AutoencoderKL", _KL16),
    },
    "flux": {
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("T5EncoderModel", _T5_XXL),
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
        "vae": ("AutoencoderKL", _KL16),
    },
}
BUILT_IN = (*_CONFIGURATIONS, *EMBEDDED)
"""Names of the models whose configurations are here."""
