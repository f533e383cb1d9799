"""What pipelines are called with, and how their tiny networks differ from those of their class: data of :mod:`zoo`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny import TEXT_WIDTH
from torch import Tensor


def embeds(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (1, 6, TEXT_WIDTH)), generator=torch.Generator().manual_seed(seed))


def mask(ones: int = 6, length: int = 6) -> Tensor:
    return (torch.arange(length) < ones).long()[None]


KANDINSKY = ("", "Img2Img", "Inpaint")
DIFFERENCES: dict[tuple[str, str], dict[str, Any]] = {
    ("StableDiffusionInstructPix2PixPipeline", "unet"): {"in_channels": 8},
    ("StableDiffusionXLInstructPix2PixPipeline", "unet"): {"in_channels": 8},
    ("FluxFillPipeline", "transformer"): {"in_channels": 16 + 16 + 256, "out_channels": 16},
    **{
        (f"FluxControl{kind}Pipeline", "transformer"): {"in_channels": 32, "out_channels": 16}
        for kind in ("", "Img2Img", "Inpaint")
    },
    ("CogView4ControlPipeline", "transformer"): {"in_channels": 8},
    **{
        (f"KandinskyV22{kind}Pipeline", "unet"): {
            "in_channels": 9 if kind == "Inpaint" else 4,
            "out_channels": 8,
            "addition_embed_type": "image",
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "encoder_hid_dim": TEXT_WIDTH,
            "encoder_hid_dim_type": "image_proj",
            "attention_head_dim": 4,
            "resnet_time_scale_shift": "scale_shift",
        }
        for kind in KANDINSKY
    },
    ("StableDiffusion3ControlNetInpaintingPipeline", "controlnet"): {"extra_conditioning_channels": 1},
    ("QwenImageControlNetInpaintPipeline", "controlnet"): {"extra_condition_channels": 4},
    ("PixArtAlphaPipeline", "transformer"): {"sample_size": 128},
    ("LatentConsistencyModelPipeline", "unet"): {"time_cond_proj_dim": 32},
    ("LatentConsistencyModelImg2ImgPipeline", "unet"): {"time_cond_proj_dim": 32},
    ("LongCatImagePipeline", "transformer"): {"in_channels": 64},
    ("LongCatImagePipeline", "vae"): {"latent_channels": 16},
    ("LongCatImageEditPipeline", "transformer"): {"in_channels": 64},
    ("LongCatImageEditPipeline", "vae"): {"latent_channels": 16},
    ("HunyuanImageRefinerPipeline", "transformer"): {
        "in_channels": 8,
        "patch_size": (1, 1, 1),
        "rope_axes_dim": (2, 2, 4),
    },
    ("Kandinsky5I2IPipeline", "transformer"): {"visual_cond": True},
    ("QwenImage21Pipeline", "transformer"): {"context_in_dim": TEXT_WIDTH},
    ("SanaSprintPipeline", "transformer"): {"guidance_embeds": True},
    ("SanaSprintImg2ImgPipeline", "transformer"): {"guidance_embeds": True},
}

TEXT = {
    "prompt_embeds": embeds(0),
    "negative_prompt_embeds": embeds(1),
    "prompt_attention_mask": mask(5),
    "negative_prompt_attention_mask": mask(4),
    "prompt_embeds_mask": mask(5),
    "negative_prompt_embeds_mask": mask(4),
}
WITH_MASKS_OF_BOOL = {name: value.bool() if "mask" in name else value for name, value in TEXT.items()}
LISTS = {"prompt_embeds": [embeds(0)[0]], "negative_prompt_embeds": [embeds(1, 1, 4, TEXT_WIDTH)[0]]}
HUNYUAN = {
    **TEXT,
    **{f"{name}_2": value for name, value in TEXT.items() if "embeds_mask" not in name},
}
CALLS: dict[str, dict[str, Any]] = {
    "HunyuanDiT2DModel": HUNYUAN,
    "HunyuanImageTransformer2DModel": {
        **TEXT,
        **{f"{'negative_' * n}prompt_embeds_2": embeds(2 + n, 1, 4, TEXT_WIDTH) for n in (0, 1)},
        **{f"{'negative_' * n}prompt_embeds_mask_2": mask(3, 4) for n in (0, 1)},
    },
    "ZImageTransformer2DModel": LISTS,
    "ErnieImageTransformer2DModel": LISTS,
    "ChromaTransformer2DModel": WITH_MASKS_OF_BOOL,
    "HiDreamImageTransformer2DModel": {
        **{f"{'negative_' * n}prompt_embeds_t5": embeds(n) for n in (0, 1)},
        **{f"{'negative_' * n}prompt_embeds_llama3": embeds(n, 2, 1, 6, TEXT_WIDTH) for n in (0, 1)},
        **{f"{'negative_' * n}pooled_prompt_embeds": embeds(n, 1, 2 * TEXT_WIDTH) for n in (0, 1)},
    },
    "Kandinsky5Transformer3DModel": {
        **{f"{'negative_' * n}prompt_embeds_qwen": embeds(n) for n in (0, 1)},
        **{f"{'negative_' * n}prompt_embeds_clip": embeds(n, 1, TEXT_WIDTH) for n in (0, 1)},
        **{f"{'negative_' * n}prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32) for n in (0, 1)},
    },
    "Krea2Transformer2DModel": {
        **WITH_MASKS_OF_BOOL,
        **{f"{'negative_' * n}prompt_embeds": embeds(n, 1, 6, 3, TEXT_WIDTH) for n in (0, 1)},
    },
    "DiTTransformer2DModel": {"class_labels": [1]},
    "Kandinsky3UNet": {**TEXT, "attention_mask": mask(5), "negative_attention_mask": mask(4)},
}
SIMPLE = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel")
"""Networks whose pipelines get a prompt as text."""


EDITS = ("FluxKontext", "QwenImageEdit", "QwenImageEditPlus", "Flux2", "Flux2Klein")
REFERENCES = {f"{name}Pipeline": ("image",) for name in EDITS}
"""Images that are no part of the canvas."""
WITH_IMAGES = (
    "Img2Img",
    "Inpaint",
    "Edit",
    "Control",
    "Pix2Pix",
    "Fill",
    "Kontext",
    "Omni",
    "I2I",
    "Layered",
    "Adapter",
    "Depth2Img",
    "Variation",
    "Refiner",
)
AS_TEXT: dict[str, Any] = {"prompt": "a", "negative_prompt": "b", "prompt_embeds": None, "negative_prompt_embeds": None}
CLASS_CALLS: dict[str, dict[str, Any]] = {
    "LongCatImagePipeline": {**AS_TEXT},
    **{
        f"KandinskyV22{kind}Pipeline": {
            "image_embeds": embeds(0, 1, TEXT_WIDTH),
            "negative_image_embeds": embeds(1, 1, TEXT_WIDTH),
            **({"output_type": "pt"} if "Controlnet" in kind else {}),
            "hint": lambda height, width: embeds(2, 1, 3, height, width),
        }
        for kind in (*KANDINSKY, "Controlnet", "ControlnetImg2Img")
    },
    "LongCatImageEditPipeline": {**AS_TEXT},
    "BriaFiboPipeline": {**AS_TEXT},
    "LatentConsistencyModelPipeline": {"original_inference_steps": 50},
    "LatentConsistencyModelImg2ImgPipeline": {"original_inference_steps": 50},
}


_reader = SimpleNamespace(dtype=torch.float32)


class _Template:
    """In place of a processor of pictures and text."""

    image_processor = None
    tokenizer = SimpleNamespace(encode=lambda _: [1])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


_template = _Template()
STUBS: dict[str, dict[str, Any]] = {
    "BriaFiboPipeline": {
        "get_prompt_embeds": lambda prompt, **_: (embeds(0, 1, 6, 2 * TEXT_WIDTH), [embeds(1)] * 3, mask(5)),
        "text_encoder": _reader,
    },
    "LongCatImagePipeline": {"_encode_prompt": lambda prompt: embeds(len(prompt[0]))},
    "LongCatImageEditPipeline": {"_encode_prompt": lambda prompt, image: embeds(len(prompt[0]))},
}
PARTS: dict[tuple[str, str], Any] = {
    ("LongCatImageEditPipeline", "text_processor"): _template,
    ("QwenImage21Pipeline", "processor"): _template,
}
"""What stands in for parts of a pipeline that read text."""
