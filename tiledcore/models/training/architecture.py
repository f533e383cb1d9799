"""The embedded models' parts: small siblings of Stable Diffusion and of FLUX, built from configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from .data import corpus

PROMPT_TOKENS = 24
TEXT_WIDTH = 128
LATENT_CHANNELS = 16
NATIVE = 32  # latent pixels: 256 px
FLOW_SHIFT = 1.5


def build_vae() -> AutoencoderKL:
    """Factor 8, narrow where the image is large.

    The decoder makes 83,000 multiplications per image pixel. There is no attention in the middle block: its cost
    grows with the square of the pixels (at 1024x1024 as much as all convolutions, at 2048x2048 four times as much).
    """
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=8 * NATIVE,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Three levels (1, 1/2, 1/4), self- and cross-attention at each."""
    return UNet2DConditionModel(
        sample_size=NATIVE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=(1, 2, 3),  # diffusers' historical name: the number of heads, here of 64 channels
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers are enough for the few dozen words that the captions use."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer trained on the captions; every word of them becomes one token.

    The trainer numbers ties differently each time, so a tokenizer that is there is used and not made again:
    a text encoder trained with one knows nothing of another's numbers.
    """
    if (folder / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    specials = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    words = [word for line in corpus() for word in line.split()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=specials,
    )
    bpe.train_from_iterator(words, trainer)
    trained = json.loads(bpe.to_str())["model"]
    # CLIP's table also holds every byte as a whole word, so that any text has a spelling.
    vocab = dict(trained["vocab"])
    for letter in sorted(alphabet):
        vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in trained["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=PROMPT_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_scheduler() -> DDIMScheduler:
    """v-prediction on a zero-terminal-SNR schedule (Lin et al. 2024), sampled from its last timestep."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_transformer() -> FluxTransformer2DModel:
    """FLUX at a small size: 2x2-packed latents, two joint and eight parallel blocks, rotary positions."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            # Every block starts as the identity (adaLN-zero, Peebles & Xie 2023).
            if name == "proj_out" or ".norm" in f".{name}":
                torch.nn.init.zeros_(module.weight)
            else:
                torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return transformer


def build_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The sequence of text tokens that FLUX attends to; CLIP gives it the pooled vector."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 4,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def build_t5_tokenizer(folder: Path) -> T5Tokenizer:
    """Every word of the captions is one token; anything else is spelled in printable ASCII."""
    words = sorted({word for line in corpus() for word in line.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    pieces += [(chr(c), -10.0) for c in range(33, 127)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=PROMPT_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow (Liu et al. 2023), with the noise levels shifted a little upwards (Esser et al. 2024)."""
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
