"""The two denoisers with their text encoders: how each makes a loss from latents and prompts, and a pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, T5EncoderModel

from . import architecture


class PlainAttention:
    """Attention as two matrix products: in training on a CPU 1.3 to 2.5 times faster than the fused kernel."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        out: torch.Tensor = attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
        return out


class UNetSibling:
    """Stable Diffusion: UNet and CLIP, v-prediction."""

    def __init__(self, work: Path) -> None:
        self.tokenizer = architecture.build_tokenizer(work / "unet_tokenizer")
        self.alphas = architecture.build_scheduler().alphas_cumprod
        text_encoder = architecture.build_text_encoder(self.tokenizer)
        self.network: Any = architecture.build_unet()
        self.network.set_attn_processor(PlainAttention())
        self.model = torch.nn.ModuleDict({"unet": self.network, "text_encoder": text_encoder})

    def start_from(self, folder: Path) -> None:
        """Take the weights of an exported model."""
        parts = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
        _take(self.model, parts, folder)

    def tokenize(self, prompts: list[str]) -> list[torch.Tensor]:
        return [self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids]

    def loss(self, latents: torch.Tensor, ids: list[torch.Tensor], level: float | None = None) -> torch.Tensor:
        """Mean squared error of v. ``level`` in 0..1 fixes the noise level, for comparisons."""
        u = stratified(len(latents)) if level is None else torch.full((len(latents),), level)
        t = (u * 1000).long().clamp(max=999)
        a = self.alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        text = self.model["text_encoder"](ids[0])[0]
        v = self.model["unet"](a.sqrt() * latents + (1 - a).sqrt() * noise, t, text).sample
        return F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * latents)

    def pipeline(self, vae: Any) -> Any:
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.model["text_encoder"],
            tokenizer=self.tokenizer,
            unet=self.model["unet"],
            scheduler=architecture.build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class FluxSibling:
    """FLUX: transformer, CLIP for the pooled text, T5 for its tokens, rectified flow."""

    def __init__(self, work: Path) -> None:
        self.tokenizer = architecture.build_tokenizer(work / "flux_tokenizer")
        self.tokenizer_2 = architecture.build_t5_tokenizer(work / "flux_tokenizer_2")
        self.model = torch.nn.ModuleDict(
            {
                "transformer": architecture.build_transformer(),
                "text_encoder": architecture.build_text_encoder(self.tokenizer),
                "text_encoder_2": architecture.build_t5_encoder(self.tokenizer_2),
            }
        )
        self.network = self.model["transformer"]

    def start_from(self, folder: Path) -> None:
        """Take the weights of an exported model."""
        parts = {"transformer": FluxTransformer2DModel, "text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
        _take(self.model, parts, folder)

    def tokenize(self, prompts: list[str]) -> list[torch.Tensor]:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        options["max_length"] = architecture.PROMPT_TOKENS
        return [tokenizer(prompts, **options).input_ids for tokenizer in (self.tokenizer, self.tokenizer_2)]

    def loss(self, latents: torch.Tensor, ids: list[torch.Tensor], level: float | None = None) -> torch.Tensor:
        """Noise levels are logit-normal (Esser et al. 2024), packing and positions the pipeline's own."""
        n, c, h, w = latents.shape
        device = latents.device
        u = (stratified(n) if level is None else torch.full((n,), level)).clamp(1e-4, 1 - 1e-4)
        sigma = torch.sigmoid(torch.special.ndtri(u) + math.log(architecture.FLOW_SHIFT)).view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        mixed = (1 - sigma) * latents + sigma * noise
        prediction = self.model["transformer"](
            hidden_states=FluxPipeline._pack_latents(mixed, n, c, h, w),
            timestep=sigma.view(-1),
            pooled_projections=self.model["text_encoder"](ids[0]).pooler_output,
            encoder_hidden_states=self.model["text_encoder_2"](ids[1])[0],
            txt_ids=torch.zeros(architecture.PROMPT_TOKENS, 3, device=device),
            img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, device, torch.float32),
        ).sample
        return F.mse_loss(prediction.float(), FluxPipeline._pack_latents(noise - latents, n, c, h, w))

    def pipeline(self, vae: Any) -> Any:
        return FluxPipeline(
            vae=vae,
            text_encoder=self.model["text_encoder"],
            tokenizer=self.tokenizer,
            text_encoder_2=self.model["text_encoder_2"],
            tokenizer_2=self.tokenizer_2,
            transformer=self.model["transformer"],
            scheduler=architecture.build_flow_scheduler(),
        )


SIBLINGS: dict[str, type[UNetSibling] | type[FluxSibling]] = {"unet": UNetSibling, "flux": FluxSibling}


def stratified(n: int) -> torch.Tensor:
    """One random number from each n-th of 0..1: the same spread of noise levels in every step."""
    return (torch.arange(n) + torch.rand(n)) / n


@torch.no_grad()
def _take(model: torch.nn.ModuleDict, parts: dict[str, Any], folder: Path) -> None:
    """Weights of an exported model. What it lacks for more latent channels starts at zero."""
    for name, kind in parts.items():
        own = model[name].state_dict()
        for key, theirs in kind.from_pretrained(folder / name, torch_dtype=torch.float32).state_dict().items():
            own[key].zero_()[tuple(map(slice, theirs.shape))] = theirs
