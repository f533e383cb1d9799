"""Arguments of the networks' forwards, by name: which of them have one entry per image of the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

PER_IMAGE = (
    "encoder_hidden_states",
    "timestep",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "pooled_projections",
    "guidance",
    "added_cond_kwargs",
)
"""Conditions: a tile batch repeats them for each tile."""
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
"""What adapters add to a UNet: images at the sizes of its levels, of which each tile gets its own part."""
REFUSED = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)
"""What adapters add to a transformer's tokens, which tile mode does not know how to cut."""
SAMPLES = ("sample", "hidden_states")
"""The image itself, as a tensor; Z-Image's is a list."""
_TENSORS = {*PER_IMAGE, *RESIDUALS, *REFUSED, *SAMPLES, "t", "additional_t_cond"}
_LISTS = ("x", "cap_feats", "img_shapes")


def one_image(arguments: dict[str, Any], i: int, batch: int) -> dict[str, Any]:
    """The arguments of image ``i`` of ``batch`` alone; tensors may be in lists and dicts, as adapters' are."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[i : i + 1] if value.ndim and value.shape[0] == batch else value
        if isinstance(value, list | tuple):
            return type(value)(cut(v) for v in value)
        return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value

    out = {name: cut(value) if name in _TENSORS else value for name, value in arguments.items()}
    return out | {name: arguments[name][i : i + 1] for name in _LISTS if name in arguments}
