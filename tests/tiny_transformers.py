"""Tiny transformer pipelines of the real classes: random weights, always the same ones, and no download.

Where a text encoder's tokenizer is not made by hand (Sana, Z-Image, Qwen-Image), the pipeline has none,
and is called with embeddings: see :func:`call`.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny import TEXT_WIDTH, text_config, tiny_tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from tiledcore import TilingConfig

NATIVE = 16
"""Side of the images that these networks are for, in latent pixels; Sana's is 4."""
CHANNELS = 4
"""Of all latents here."""
SHIFT = {"base_image_seq_len": 16, "max_image_seq_len": 64, "base_shift": 0.5, "max_shift": 1.15}


def tiny_sd3() -> StableDiffusion3Pipeline:
    """Two CLIP encoders and T5, dynamic shift; tokens of 2x2 latent pixels inside the network."""
    tokenizer = tiny_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=NATIVE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=12,
        ).eval(),
        scheduler=_flow_euler(),
        vae=_vae(),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(2 * TEXT_WIDTH),
        tokenizer_3=_t5_tokenizer(),
    )


def tiny_flux() -> FluxPipeline:
    """CLIP and T5, guidance embedding, packed latents, rotary positions."""
    tokenizer = tiny_tokenizer()
    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
        scheduler=_flow_euler(),
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=_t5(TEXT_WIDTH),
        tokenizer_2=_t5_tokenizer(),
    )
    pipe.default_sample_size = NATIVE
    return pipe


def tiny_pixart_alpha() -> PixArtAlphaPipeline:
    """T5, size conditions; its sample_size stays 128 (1024 px), for with it come the conditions."""
    return PixArtAlphaPipeline(transformer=_pixart(128), **_pixart_parts())


def tiny_pixart_sigma() -> PixArtSigmaPipeline:
    """T5, learned variance (twice the channels)."""
    return PixArtSigmaPipeline(transformer=_pixart(NATIVE), **_pixart_parts())


def tiny_sana() -> SanaPipeline:
    """Linear attention and convolutions, a latent pixel is 32x32 pixels."""
    return SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderDC(
            latent_channels=CHANNELS,
            attention_head_dim=2,
            encoder_block_out_channels=(4, 4, 4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4, 4, 4),
            encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), (), (5,), (5,)),
            decoder_qkv_multiscales=((), (), (), (), (5,), (5,)),
            encoder_block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
            decoder_block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
            upsample_block_type="interpolate",
            downsample_block_type="conv",
        ).eval(),
        transformer=SanaTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT_WIDTH,
            sample_size=4,
        ).eval(),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )


def tiny_z_image() -> ZImagePipeline:
    """Lists in place of batches; positions up to 128 tokens along an axis."""
    return ZImagePipeline(
        scheduler=_flow_euler(),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=ZImageTransformer2DModel(
            in_channels=CHANNELS,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 16, 16],
        ).eval(),
    )


def tiny_qwen() -> QwenImagePipeline:
    """Packed latents, rotary positions from the image's shape, a causal video autoencoder."""
    pipe = QwenImagePipeline(
        scheduler=_flow_euler(),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
        ).eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=QwenImageTransformer2DModel(
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )
    pipe.default_sample_size = NATIVE
    return pipe


ALL = [tiny_sd3, tiny_flux, tiny_pixart_alpha, tiny_pixart_sigma, tiny_sana, tiny_z_image, tiny_qwen]
BINNED = [tiny_pixart_alpha, tiny_pixart_sigma, tiny_sana]
SHIFTED = [tiny_sd3, tiny_flux, tiny_z_image, tiny_qwen]
PACKED = [tiny_flux, tiny_qwen]


def build(make: Callable[[], Any], seed: int = 0) -> Any:
    """The same weights each time. Outputs that diffusers initialises with zeros get weights as well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = make()
        for parameter in pipe.transformer.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def side(make: Any) -> int:
    """Of a tile, in latent pixels."""
    return 4 if make is tiny_sana else NATIVE


def tiles(make: Any, **kwargs: Any) -> TilingConfig:
    return TilingConfig(**{"tile": side(make), "overlap": side(make) // 4, **kwargs})


def canvas(make: Any) -> tuple[int, int]:
    """2 by 3 tiles; small enough for every network to run on it untiled."""
    return (6, 8) if make is tiny_sana else (22, 24) if make is tiny_sd3 else (22, 32)


def _embeds(length: int, seed: int) -> torch.Tensor:
    return torch.randn(2, length, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def _mask(*lengths: int) -> torch.Tensor:
    return (torch.arange(6) < torch.tensor(lengths)[:, None]).long()


EMBEDS: dict[Callable[[], Any], dict[str, Any]] = {
    tiny_sana: {
        "prompt_embeds": _embeds(6, 0),
        "prompt_attention_mask": _mask(4, 6),
        "negative_prompt_embeds": _embeds(6, 1),
        "negative_prompt_attention_mask": _mask(2, 3),
    },
    tiny_z_image: {
        "prompt_embeds": [_embeds(5, 0)[0], _embeds(40, 0)[1]],
        "negative_prompt_embeds": [_embeds(3, 1)[0], _embeds(3, 1)[1]],
    },
    tiny_qwen: {
        "prompt_embeds": _embeds(6, 0),
        "prompt_embeds_mask": _mask(4, 6),
        "negative_prompt_embeds": _embeds(6, 1),
        "negative_prompt_embeds_mask": _mask(3, 2),
    },
}
"""Two captions of different lengths, so that masks and lists of unequal lengths are seen."""


def call(pipe: Any, make: Callable[[], Any], size: tuple[int, int], images: int = 1, **kwargs: Any) -> Any:
    """Run a pipeline (tiled or not) for two steps; returns what it returns as ``images``.

    Args:
        pipe: made by ``build(make)``, or around it.
        make: one of the functions above.
        size: of the canvas, in latent pixels.
        images: 1 or 2, each with its own prompt.
        kwargs: of the pipeline; the result is latents unless they say otherwise.
    """
    factor = pipe.vae_scale_factor
    defaults: dict[str, Any] = {"height": size[0] * factor, "width": size[1] * factor}
    defaults |= {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    if make in EMBEDS:
        defaults |= {name: rows[:images] for name, rows in EMBEDS[make].items()}
    else:
        defaults |= {"prompt": ["a coast", "ice"][:images], "max_sequence_length": 16}
    if make in (tiny_pixart_alpha, tiny_pixart_sigma):
        defaults["clean_caption"] = False
    if make is tiny_sana:
        defaults["negative_prompt"] = None
    if make in BINNED and type(pipe).__name__ != "TiledPipeline":
        defaults["use_resolution_binning"] = False
    return pipe(**{**defaults, **kwargs}).images


def _flow_euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **SHIFT)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=2,
        sample_size=128,
        shift_factor=0.1,
    ).eval()


def _pixart(sample_size: int) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=TEXT_WIDTH,
        sample_size=sample_size,
        norm_num_groups=4,
    ).eval()


def _pixart_parts() -> dict[str, Any]:
    return {
        "tokenizer": _t5_tokenizer(),
        "text_encoder": _t5(TEXT_WIDTH),
        "vae": _vae(),
        # PixArt's own beta_end of 0.02 magnifies the rounding of the first steps by over a hundred.
        "scheduler": DPMSolverMultistepScheduler(beta_end=0.005),
    }


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=300, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with a vocabulary of single letters."""
    letters = [("▁", -2.0), *((chr(c), -3.0) for c in range(ord("a"), ord("z") + 1))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)
