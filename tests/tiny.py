"""Tiny pipelines of the real classes: random weights, always the same ones, and no download."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TEXT_WIDTH = 32
PROMPT_TOKENS = 40
TIME_WIDTH = 8
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tiny_sd(seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion: native size 16 latent pixels (128 px), VAE factor 8, DDIM."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        return StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            unet=tiny_unet(cross_attention_dim=TEXT_WIDTH),
            scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL: two text encoders, size conditioning, Euler; the rest as in :func:`tiny_sd`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        return StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=tiny_unet(
                cross_attention_dim=2 * TEXT_WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=TIME_WIDTH,
                projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_WIDTH,
                use_linear_projection=True,
            ),
            scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
            add_watermarker=False,
        )


def tiny_unet(**conditioning: Any) -> UNet2DConditionModel:
    """Two levels, self- and cross-attention at both and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=(1, 2),  # diffusers' historical name: the number of heads
        norm_num_groups=4,
        **conditioning,
    ).eval()


def tiny_vae() -> AutoencoderKL:
    """Four levels, so that a latent pixel is 8x8 pixels."""
    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=128,
    ).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=PROMPT_TOKENS)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,  # SDXL reads the last but one
        num_attention_heads=2,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
