"""Tiny networks of every family that canvas mode knows, with random weights, and inputs for them."""

from collections.abc import Callable
from typing import Any

import tiny
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor

# Random heads attend almost evenly; larger weights make every score count.
SHARPEN = 3.0
TEXT = 7
HEADS, DIM = 2, 8
NATIVE = 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def build(make: Callable[[], Any]) -> Any:
    """A network with random weights, always the same, of which every branch matters."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = make().eval()
        for name, weight in network.named_parameters():
            if weight.ndim < 2 and not name.endswith("bias"):
                weight.uniform_(0.5, 1.5)
            if any(part in name for part in ("to_q.w", "to_k.w", "add_q_proj.w", "add_k_proj.w")):
                weight.mul_(SHARPEN)
    return network


def same(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 1e-2  # else anything would pass
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def unet_inputs(height: int, width: int, batch: int) -> dict[str, Any]:
    return {
        "sample": normal(batch, 4, height, width),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": normal(batch, TEXT, tiny.TEXT_WIDTH, seed=1),
    }


def sdxl_inputs(height: int, width: int, batch: int) -> dict[str, Any]:
    return {
        "sample": normal(batch, 4, height, width),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": normal(batch, TEXT, 2 * tiny.TEXT_WIDTH, seed=1),
        "added_cond_kwargs": {
            "text_embeds": normal(batch, tiny.TEXT_WIDTH, seed=2),
            "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(batch, 1),
        },
    }


def sdxl_unet() -> Any:
    return tiny.tiny_unet(
        cross_attention_dim=2 * tiny.TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=tiny.TIME_WIDTH,
        projection_class_embeddings_input_dim=tiny.TEXT_WIDTH + 6 * tiny.TIME_WIDTH,
        use_linear_projection=True,
    )


def sd3() -> Any:
    return SD3Transformer2DModel(
        sample_size=NATIVE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        caption_projection_dim=HEADS * DIM,
        pooled_projection_dim=6,
        pos_embed_max_size=6,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def sd3_inputs(height: int, width: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, height, width),
        "encoder_hidden_states": normal(batch, TEXT, 12, seed=1),
        "pooled_projections": normal(batch, 6, seed=2),
        "timestep": torch.full((batch,), 500.0),
    }


def pixart() -> Any:
    return PixArtTransformer2DModel(
        sample_size=NATIVE,
        num_layers=2,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        cross_attention_dim=HEADS * DIM,
        caption_channels=12,
    )


def pixart_inputs(height: int, width: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, height, width),
        "encoder_hidden_states": normal(batch, TEXT, 12, seed=1),
        "timestep": torch.full((batch,), 500.0),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sana() -> Any:
    return SanaTransformer2DModel(
        sample_size=NATIVE,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=DIM,
        cross_attention_dim=HEADS * DIM,
        caption_channels=12,
    )


def sana_inputs(height: int, width: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, height, width),
        "encoder_hidden_states": normal(batch, TEXT, 12, seed=1),
        "timestep": torch.full((batch,), 500.0),
    }


def flux() -> Any:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
    )


def flux_inputs(height: int, width: int, batch: int) -> dict[str, Any]:
    h, w = height // 2, width // 2
    ids = torch.zeros(h, w, 3)
    ids[..., 1] = torch.arange(h)[:, None]
    ids[..., 2] = torch.arange(w)
    return {
        "hidden_states": normal(batch, h * w, 16),
        "encoder_hidden_states": normal(batch, TEXT, 12, seed=1),
        "pooled_projections": normal(batch, 6, seed=2),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def qwen() -> Any:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )


def qwen_inputs(height: int, width: int, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT)
    mask[-1, 4:] = 0  # prompts of different lengths
    return {
        "hidden_states": normal(batch, height * width // 4, 16),
        "encoder_hidden_states": normal(batch, TEXT, 12, seed=1),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, height // 2, width // 2)]] * batch,
    }


def z_image() -> Any:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=HEADS * DIM,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=12,
        axes_dims=[2, 2, 4],
        axes_lens=[128, 32, 32],
    )


def z_image_inputs(height: int, width: int, batch: int) -> dict[str, Any]:
    return {
        "x": [normal(4, 1, height, width, seed=i) for i in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [normal(TEXT + 40 * i, 12, seed=9 + i) for i in range(batch)],  # of different padded lengths
    }


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[int, int, int], dict[str, Any]]]] = {
    "unet": (lambda: tiny.tiny_unet(cross_attention_dim=tiny.TEXT_WIDTH), unet_inputs),
    "sdxl": (sdxl_unet, sdxl_inputs),
    "sd3": (sd3, sd3_inputs),
    "pixart": (pixart, pixart_inputs),
    "sana": (sana, sana_inputs),
    "flux": (flux, flux_inputs),
    "qwen": (qwen, qwen_inputs),
    "z_image": (z_image, z_image_inputs),
}


def make(family: str, height: int, width: int, batch: int = 2) -> tuple[Any, dict[str, Any]]:
    network, inputs = FAMILIES[family]
    return build(network), inputs(height, width, batch)
