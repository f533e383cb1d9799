"""Where the canvas is in a network's arguments, and what replaces them for tiles.

A *layout* is a dict of :class:`~tiledcore.tiles.families.Family`'s fields: an image, tokens with positions, tokens with
shapes. Reference images are tokens behind the canvas' own: each tile gets them whole, behind its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Arguments = dict[str, Any]


def to_tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, H*W, C]``, row by row."""
    return image.flatten(2).transpose(1, 2).contiguous()


def to_image(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H*W, C]`` -> ``[B, C, H, W]``; tokens behind these, which are of references, are left out."""
    return tokens[:, : size[0] * size[1]].transpose(1, 2).unflatten(2, size).contiguous()


def with_references(tiles: Tensor, arguments: Arguments) -> Tensor:
    """The tokens of tiles, and behind them those of the reference images."""
    own, others = to_tokens(tiles), arguments.get("references")
    return own if others is None else torch.cat([own, others], 1)


# ----------------------------------------------------------------------------- tokens with ids: FLUX


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # ids -> tokens of the canvas, its width, ids out of place


def raster(given: Tensor) -> tuple[int, int]:
    """Size of the canvas, in tokens, whose ids ``[N, n]`` or ``[B, N, n]`` come first; columns 1 and 2 are y and x.

    Tokens of another image differ in column 0.
    """
    ids = given[0] if given.ndim == 3 else given
    if given not in _read:  # most pipelines pass the same ids in every step
        own, at = (ids[:, 0] == ids[0, 0]).cumprod(0), torch.arange(len(ids), device=ids.device)
        # Width = tokens with the row of the first one. Not the last id plus one: ids come in the network's
        # dtype, and bfloat16 has no odd numbers above 256.
        width = ((ids[:, 1] == ids[0, 1]) * own).sum()
        wanted = torch.stack([at // width, at % width], 1) + ids[0, 1:3]
        strange = (ids[:, 1:3] != wanted.to(ids.dtype)).any(1) * own
        _read[given] = torch.stack([own.sum(), width, strange.sum()]).tolist()
    total, width, strange = _read[given]
    if strange or total % width:
        raise ValueError(f"img_ids of {len(ids)} tokens: the first {total} are no image of width {width}, row by row")
    return total // width, width


def _ids_canvas(arguments: Arguments) -> Tensor:
    tokens, ids = arguments["hidden_states"], arguments["img_ids"]
    if tokens.shape[1] != ids.shape[-2]:
        raise ValueError(f"img_ids of {ids.shape[-2]} tokens for {tokens.shape[1]} tokens")
    if arguments.get("num_ref_tokens") or arguments.get("kv_cache") is not None:
        raise ValueError("kv_cache: keys of reference images are kept from step to step, which tiles cannot share")
    return to_image(tokens, raster(ids))


def _ids_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    ids, others = arguments["img_ids"], arguments.get("references")
    one = ids[0] if ids.ndim == 3 else ids
    own = one[:1].repeat(tiles.shape[2] * tiles.shape[3], 1)  # from the canvas' first position on
    for column, place in zip((1, 2), token_places(tiles), strict=True):
        own[:, column] += place.to(ids.dtype)
    if others is not None:
        own = torch.cat([own, one[-others.shape[1] :]])
    changed = {"img_ids": own.expand(len(tiles), -1, -1) if ids.ndim == 3 else own}
    return changed | {"hidden_states": with_references(tiles, arguments)} | _masks(tiles, arguments)


def token_places(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(y, x) of each token of a tile, row by row."""
    rows, columns = (torch.arange(n, device=tiles.device) for n in tiles.shape[2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return y.flatten(), x.flatten()


def _masks(tiles: Tensor, arguments: Arguments) -> Arguments:
    """Masks of the text's and the images' tokens together, ``[..., T + N]``, without the tokens of other tiles."""
    text, others = arguments["encoder_hidden_states"].shape[1], arguments.get("references")
    kept = text + tiles.shape[2] * tiles.shape[3]

    def cut(mask: Tensor) -> Tensor:
        if mask.shape[-1] <= text:
            return mask
        behind = [] if others is None else [mask[..., -others.shape[1] :]]
        mask = torch.cat([mask[..., :kept], *behind], -1)
        return mask.repeat_interleave(len(tiles) // len(mask), 0)

    changed: Arguments = {}
    if arguments.get("attention_mask") is not None:
        changed["attention_mask"] = cut(arguments["attention_mask"])
    extra = arguments.get("joint_attention_kwargs") or {}
    if extra.get("attention_mask") is not None:
        changed["joint_attention_kwargs"] = {**extra, "attention_mask": cut(extra["attention_mask"])}
    return changed


IDS: dict[str, Any] = {
    "packed": True,
    "patch": lambda network: 2,  # packed by the pipeline: the network's own patch_size is 1
    "clock": lambda timesteps: timesteps / 1000,
    "canvas": _ids_canvas,
    "tiles": _ids_tiles,
    "prediction": to_image,
    "result": lambda prediction, sample: to_tokens(prediction),
}
"""Tokens of 2x2 latent pixels, and ``img_ids`` ``[N, n]``: (image, y, x, ...) of each."""

# ----------------------------------------------------------------------------- tokens with shapes: Qwen-Image


def _shapes_of(arguments: Arguments) -> list[tuple[int, int, int]]:
    """(frames, height, width) of the canvas and of the reference images, in tokens."""
    shapes = arguments["img_shapes"]
    return [shapes[0]] if isinstance(shapes[0][0], int) else list(shapes[0])


def _shapes_canvas(arguments: Arguments) -> Tensor:
    tokens, images = arguments["hidden_states"], _shapes_of(arguments)
    if arguments.get("additional_t_cond") is not None:
        raise ValueError("img_shapes: the layers of a picture (Qwen-Image Layered, up to 1024x1024) cannot be tiled")
    if images[0][0] != 1 or tokens.shape[1] != sum(t * h * w for t, h, w in images):
        raise ValueError(f"img_shapes={images} for {tokens.shape[1]} tokens: frames and layers cannot be tiled")
    return to_image(tokens, images[0][1:])


def _shapes_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    own, given = (1, *tiles.shape[2:]), arguments["img_shapes"]
    nested = not isinstance(given[0][0], int)
    shapes = [[own, *_shapes_of(arguments)[1:]] if nested else own] * len(tiles)
    return {"hidden_states": with_references(tiles, arguments), "img_shapes": shapes}


SHAPES: dict[str, Any] = {
    **IDS,
    "canvas": _shapes_canvas,
    "tiles": _shapes_tiles,
}
"""Tokens of 2x2 latent pixels, and ``img_shapes``: (frames, height, width) of each image."""

# ----------------------------------------------------------------------------- images


def pixart_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    changed: Arguments = {"hidden_states": tiles}
    conditions = arguments.get("added_cond_kwargs") or {}
    if conditions.get("resolution") is not None:
        # PixArt-α's micro-conditions, in image pixels: a tile is an image of its own size.
        height, width = (pixels * n for n in tiles.shape[2:])
        column = (len(tiles), 1)
        full = conditions["resolution"].new_full
        changed["added_cond_kwargs"] = {
            **conditions,
            "resolution": torch.cat([full(column, height), full(column, width)], 1),
            "aspect_ratio": full(column, height / width),
        }
    return changed


def z_image_canvas(arguments: Arguments) -> Tensor:
    images = [one[-1] if isinstance(one, list) else one for one in arguments["x"]]  # Omni: behind its references
    if images[0].shape[1] != 1 or len({image.shape for image in images}) > 1:
        raise ValueError(f"x: images of {[tuple(image.shape) for image in images]}: all must be [C, 1, H, W], one size")
    return torch.stack(images).squeeze(2)


def z_image_tiles(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    captions = arguments["cap_feats"]  # per image: a tensor [L, D], or in Omni a list of these
    each, own = len(tiles) // len(captions), list[Any](tiles.unsqueeze(2).unbind(0))
    names = [name for name in ("cap_feats", "siglip_feats", "image_noise_mask") if arguments.get(name) is not None]
    changed = {name: [one for one in arguments[name] for _ in range(each)] for name in names}
    if (others := arguments.get("reference_images")) is not None:
        own = [[*others[i // each], tile] for i, tile in enumerate(own)]
    return {"x": own, **changed}


def sized(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    """CogView: size and crop in image pixels; a tile is an image of its own size."""
    full = arguments["target_size"].new_full
    size = torch.cat([full((len(tiles), 1), n * pixels) for n in tiles.shape[2:]], 1)
    changed = {"hidden_states": tiles, "target_size": size, "crop_coords": torch.zeros_like(size)}
    return changed | ({"original_size": size} if "original_size" in arguments else {})
