"""Tiny networks, parts and arguments of the pipelines that need more than :mod:`zoo_calls` has."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from PIL import Image
from tiny import TEXT_WIDTH, text_config, tiny_tokenizer
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection
from zoo_models import UNET

WIDE = 5 * TEXT_WIDTH


def embeds(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (1, 6, TEXT_WIDTH)), generator=torch.Generator().manual_seed(seed))


MORE_NETWORKS: dict[str, dict[str, Any]] = {
    "ControlNetUnionModel": {
        **UNET,
        "conditioning_embedding_out_channels": (4, 4, 4, 4),
        "num_trans_channel": 16,
        "num_trans_head": 2,
        "num_proj_channel": 16,
    },
    "ControlNetXSAdapter": {
        "block_out_channels": (8, 16),
        "base_block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": (4, 4, 4, 4),
        "num_attention_heads": 2,
        "max_norm_num_groups": 4,
        "use_linear_projection": False,
        "cross_attention_dim": TEXT_WIDTH,
    },
    "ZImageControlNetModel": {
        "control_layers_places": [0],
        "control_refiner_layers_places": [0],
        "control_in_dim": 4,
        "dim": 32,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
    },
    "BriaFibo2Transformer2DModel": {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": TEXT_WIDTH,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 4,
        "gist_min_text_len": 4,
        "gist_max_text_len": 16,
        "axes_dims": (4, 6, 6),
        "axes_lens": (64, 64, 64),
    },
    "DreamLiteUNetModel": {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": TEXT_WIDTH,
        "norm_num_groups": 4,
        "addition_embed_type": "time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16,
        "use_linear_projection": True,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (4, 4, 4, 4),
        "decoder_block_out_channels": (4, 4, 4, 4),
        "num_encoder_blocks": (1, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 1),
    },
    "JoyImageEditTransformer3DModel": {
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": TEXT_WIDTH,
        "num_layers": 1,
        "rope_dim_list": [4, 6, 6],
    },
    "Ideogram4Transformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 8,
        "llm_features_dim": TEXT_WIDTH,
        "mrope_section": (4, 2, 2),
    },
    "PriorTransformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "embedding_dim": TEXT_WIDTH,
        "num_embeddings": 40,
        "num_layers": 1,
    },
    "StableUnCLIPImageNormalizer": {"embedding_dim": TEXT_WIDTH},
}
MORE_NETWORKS["JoyImageEditPlusTransformer3DModel"] = MORE_NETWORKS["JoyImageEditTransformer3DModel"]


def _vision() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, projection_dim=TEXT_WIDTH, image_size=224, patch_size=112)
    return CLIPVisionModelWithProjection(config).eval()


def _pooled_text() -> Any:
    return CLIPTextModelWithProjection(text_config(tiny_tokenizer())).eval()


PICTURE = Image.radial_gradient("L").convert("RGB").resize((128, 128))
READER = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
"""In place of a text encoder whose result the call is given."""
UNCLIP = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * TEXT_WIDTH}
KANDINSKY_21 = {
    "in_channels": 4,
    "out_channels": 8,
    "addition_embed_type": "text_image",
    "encoder_hid_dim_type": "text_image_proj",
    "encoder_hid_dim": TEXT_WIDTH,
    "cross_attention_dim": TEXT_WIDTH,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
}
V22_HINT = {**KANDINSKY_21, "in_channels": 8, "addition_embed_type": "image_hint", "encoder_hid_dim_type": "image_proj"}
LEVELS = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 4,
    "attention_head_dim": 2,
}
MORE_DIFFERENCES: dict[tuple[str, str], dict[str, Any]] = {
    ("BlipDiffusionControlNetPipeline", "unet"): {**LEVELS, "up_block_types": ("CrossAttnUpBlock2D",) * 4},
    ("BlipDiffusionControlNetPipeline", "controlnet"): LEVELS,
    **{(f"StableDiffusion{kind}ControlNetXSPipeline", "unet"): {"layers_per_block": 2} for kind in ("", "XL")},
    ("StableDiffusionXLControlNetXSPipeline", "controlnet"): {
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "use_linear_projection": True,
    },
    ("StableDiffusionDepth2ImgPipeline", "unet"): {"in_channels": 5},
    ("StableUnCLIPPipeline", "unet"): UNCLIP,
    ("StableUnCLIPImg2ImgPipeline", "unet"): UNCLIP,
    **{(f"Kandinsky{kind}Pipeline", "unet"): KANDINSKY_21 for kind in ("", "Img2Img")},
    ("KandinskyInpaintPipeline", "unet"): {**KANDINSKY_21, "in_channels": 9},
    **{(f"KandinskyV22{kind}Pipeline", "unet"): V22_HINT for kind in ("Controlnet", "ControlnetImg2Img")},
    ("GlmImagePipeline", "transformer"): {"text_embed_dim": TEXT_WIDTH},
    ("ZImageControlNetInpaintPipeline", "controlnet"): {"control_in_dim": 9},
    ("ZImageOmniPipeline", "transformer"): {"siglip_feat_dim": 8},
    ("HunyuanImageRefinerPipeline", "transformer"): {
        "in_channels": 16,
        "out_channels": 8,
        "patch_size": (1, 1, 1),
        "rope_axes_dim": (2, 2, 4),
        "guidance_embeds": True,
    },
    **{
        (f"VisualCloze{kind}Pipeline", "transformer"): {"in_channels": 16 + 16 + 256, "out_channels": 16}
        for kind in ("", "Generation")
    },
}


def _kandinsky_text(prompt: Any, device: Any, count: int, guided: bool, negative: Any = None) -> Any:
    both = [embeds(1), embeds(0)] if guided else [embeds(0)]
    tokens = torch.cat(both)
    return tokens.mean(1), tokens, torch.ones(len(both), 6)


def _bert(ids: Tensor) -> tuple[Tensor]:
    return (embeds(int(ids.sum()), len(ids), 6, TEXT_WIDTH),)


class _Bert(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return _bert(ids)


class _OmniGen:
    """Gives what OmniGen's processor of text and images gives, for a text of 6 tokens and a negative one of 4."""

    max_image_size = 1024

    def __call__(self, prompts: Any, images: Any, height: int, width: int, **_: Any) -> dict[str, Any]:
        count, rows, seen = height * width // 256, [], 4
        given = images is not None and images[0] is not None
        for text in (10, 4, 8) if given else (6, 4):
            length, most = text + 1 + count, (10 if given else 6) + 1 + count
            own = torch.ones(length, length).tril()
            own[text + 1 :] = 1
            whole = torch.ones(most, most)
            whole[most - length :, : most - length] = 0
            whole[most - length :, most - length :] = own
            positions = torch.cat([torch.zeros(most - length), torch.arange(length)])
            rows.append((torch.randint(3, 50, (most - 1 - count,)), positions.long(), whole))
        places = {0: [[1, 1 + seen]], 2: [[3, 3 + seen]]} if given else {}
        pixels = [torch.ones(1, 3, 32, 32)] * len(places)
        ids, positions, masks = (torch.stack(list(parts)) for parts in zip(*rows, strict=True))
        more = {"input_pixel_values": pixels, "input_image_sizes": places}
        return {"input_ids": ids, "position_ids": positions, "attention_mask": masks, **more}


def _ideogram_text(prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
    text, count = max_sequence_length, grid_h * grid_w
    own = torch.stack(torch.meshgrid(torch.arange(grid_h), torch.arange(grid_w), indexing="ij"), -1).flatten(0, 1)
    image = torch.cat([torch.zeros(count, 1), own], 1) + 100
    ids = torch.cat([torch.arange(text)[:, None].expand(text, 3), image])[None].long()
    features = torch.cat([embeds(0, 1, text, TEXT_WIDTH), torch.zeros(1, count, TEXT_WIDTH)], 1)
    kinds = torch.cat([torch.full((text,), 3), torch.full((count,), 2)])[None]
    return features, ids, torch.ones(1, text + count).long(), kinds


def _fibo(prompt: Any, **_: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    return embeds(len(prompt[0]), 1, 6, 2 * TEXT_WIDTH), [embeds(len(prompt[0]))] * 3, torch.ones(1, 6).long()


def _dreamlite(prompts: Any, **_: Any) -> tuple[Tensor, Tensor]:
    return embeds(0, len(prompts), 6, TEXT_WIDTH), torch.ones(len(prompts), 6)


def _joy(prompt: Any, **_: Any) -> tuple[Tensor, Tensor]:
    return embeds(len(prompt[0])), torch.ones(1, 6)


if not hasattr(transformer_cosmos, "transforms"):  # without torchvision

    def _resize(mask: Tensor, size: list[int], **_: Any) -> Tensor:
        return torch.nn.functional.interpolate(mask, size, mode="nearest")

    resizing = SimpleNamespace(resize=_resize)
    transformer_cosmos.transforms = SimpleNamespace(functional=resizing, InterpolationMode=SimpleNamespace(NEAREST=0))  # type: ignore[attr-defined]


class _Guard:
    """In place of a filter of unsafe texts."""

    def to(self, _: Any) -> None: ...

    def check_text_safety(self, _: str) -> bool:
        return True


MORE_STUBS: dict[str, dict[str, Any]] = {
    **{
        f"Kandinsky{kind}Pipeline": {"_encode_prompt": _kandinsky_text, "text_encoder": READER}
        for kind in ("", "Img2Img", "Inpaint")
    },
    "OmniGenPipeline": {"multimodal_processor": _OmniGen()},
    "ChromaInpaintPipeline": {"transformer.config.guidance_embeds": False},
    "Ideogram4Pipeline": {"encode_prompt": _ideogram_text},
    "BriaFiboEditPipeline": {"get_prompt_embeds": _fibo, "text_encoder": READER},
    "DreamLitePipeline": {"encode_prompt": _dreamlite, "text_encoder": READER},
    "DreamLiteMobilePipeline": {"encode_prompt": _dreamlite, "text_encoder": READER},
    **{
        f"JoyImageEdit{kind}Pipeline": {
            "encode_prompt_multiple_images": _joy,
            "text_encoder": READER,
            "image_processor.get_default_height_width": lambda *_: (128, 128),
        }
        for kind in ("", "Plus")
    },
    "BlipDiffusionControlNetPipeline": {
        "get_query_embeddings": lambda image, subject: None,
        "encode_prompt": lambda query, prompt, device=None: embeds(0),
    },
    "ZImageOmniPipeline": {
        "prepare_image_latents": lambda images, batch_size, **_: [[embeds(5, 4, 1, 16, 16)] for _ in range(batch_size)],
        "prepare_siglip_embeds": lambda images, batch_size, **_: [[embeds(6, 2, 2, 8)] for _ in range(batch_size)],
    },
    "QwenImageLayeredPipeline": {"text_encoder": READER, "encode_prompt": _joy},
}
MORE_PARTS: dict[tuple[str, str], Any] = {
    ("LDMTextToImagePipeline", "bert"): _Bert(),
    ("LDMTextToImagePipeline", "tokenizer"): tiny_tokenizer(),
    ("Cosmos2TextToImagePipeline", "safety_checker"): _Guard(),
    ("Cosmos2TextToImagePipeline", "scheduler"): diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    ("ZImageOmniPipeline", "siglip"): None,
    ("BlipDiffusionControlNetPipeline", "scheduler"): diffusers.PNDMScheduler(skip_prk_steps=True),
    ("BlipDiffusionControlNetPipeline", "qformer"): None,
    ("StableDiffusionSAGPipeline", "scheduler"): diffusers.DDIMScheduler(steps_offset=1),
    ("StableDiffusionParadigmsPipeline", "scheduler"): diffusers.DDIMParallelScheduler(steps_offset=1),
    ("CycleDiffusionPipeline", "scheduler"): diffusers.DDIMScheduler(steps_offset=1),
    ("PaintByExamplePipeline", "image_encoder"): None,
    ("BlipDiffusionControlNetPipeline", "image_processor"): BlipImageProcessor(),
    ("StableDiffusionDepth2ImgPipeline", "depth_estimator"): None,
    ("StableDiffusionImageVariationPipeline", "image_encoder"): _vision(),
    ("StableUnCLIPImg2ImgPipeline", "image_encoder"): _vision(),
    ("StableUnCLIPPipeline", "prior_tokenizer"): tiny_tokenizer(),
    ("StableUnCLIPPipeline", "prior_text_encoder"): _pooled_text(),
    ("StableUnCLIPPipeline", "prior_scheduler"): diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample"
    ),
}

TEXTS: dict[str, Any] = {
    "prompt": "a coast",
    "negative_prompt": "b",
    "prompt_embeds": None,
    "negative_prompt_embeds": None,
}
SUBJECT = {"source_subject_category": "dog", "target_subject_category": "dog", "neg_prompt": ""}
MORE_CALLS: dict[str, dict[str, Any]] = {
    **{
        f"Kandinsky{kind}Pipeline": {
            **TEXTS,
            "image_embeds": embeds(0, 1, TEXT_WIDTH),
            "negative_image_embeds": embeds(1, 1, TEXT_WIDTH),
            "output_type": "pt",
        }
        for kind in ("", "Img2Img", "Inpaint")
    },
    **{f"StableDiffusionXLControlNetUnion{kind}Pipeline": {"control_mode": 0} for kind in ("", "Img2Img", "Inpaint")},
    "StableDiffusionDepth2ImgPipeline": {"depth_map": lambda height, width: embeds(2, 1, height, width)},
    "StableUnCLIPPipeline": {"prior_num_inference_steps": 2},
    "LDMTextToImagePipeline": {"output_type": "pt"},
    "CycleDiffusionPipeline": {"source_prompt": "a sea", "image": PICTURE, "eta": 0.1},
    "StableDiffusionAttendAndExcitePipeline": {"token_indices": [2]},
    "OmniGenPipeline": {**TEXTS, "input_images": None},
    "Ideogram4Pipeline": {**TEXTS, "guidance_scale": None, "guidance_schedule": [3.0, 2.0]},
    "GlmImagePipeline": {"prior_token_ids": lambda height, width: torch.arange(height * width // 256)[None] % 128},
    "ZImageOmniPipeline": {
        "image": PICTURE,
        **{f"{'negative_' * n}prompt_embeds": [[embeds(n)[0], embeds(2 + n)[0]]] for n in (0, 1)},
    },
    "BriaFiboEditPipeline": {**TEXTS, "prompt": json.dumps({"edit_instruction": "a coast"})},
    "DreamLitePipeline": TEXTS,
    "DreamLiteMobilePipeline": TEXTS,
    "JoyImageEditPipeline": TEXTS,
    "JoyImageEditPlusPipeline": {**TEXTS, "images": [PICTURE]},
    "QwenImageLayeredPipeline": {**TEXTS, "resolution": 640, "output_type": "pt"},
    "BriaFibo2Pipeline": {
        "prompt_embeds_mask": torch.ones(1, 6).bool(),
        "negative_prompt_embeds_mask": torch.ones(1, 6).bool(),
        **{f"{'negative_' * n}prompt_embeds": embeds(n, 1, 2, 6, TEXT_WIDTH) for n in (0, 1)},
    },
    **{
        f"VisualCloze{kind}Pipeline": {
            "task_prompt": "a",
            "content_prompt": "b",
            "image": [[PICTURE] * 2, [PICTURE, None]],
        }
        for kind in ("", "Generation")
    },
    "BlipDiffusionControlNetPipeline": {
        **TEXTS,
        **SUBJECT,
        "guidance_scale": 1.0,
        "output_type": "pt",
        "reference_image": PICTURE,
        "condtioning_image": lambda height, width: PICTURE.resize((width, height)),
    },
}
