"""Where the canvas is in a network's arguments, and what else of them differs for tiles.

A *layout* is a dict of :class:`~tiledcore.tiles.families.Family`'s fields: an image, a frame, tokens with
positions, tokens with shapes. A tile is an image of its own size, whose positions start at 0 or where the canvas' do.
Reference images are tokens behind the canvas' own: each tile gets them whole, behind its own tokens.
"""

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from tiledcore.geometry import Pair

Arguments = dict[str, Any]


def to_tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, H*W, C]``, row by row."""
    return image.flatten(2).transpose(1, 2).contiguous()


def to_image(tokens: Tensor, size: Pair) -> Tensor:
    """``[B, H*W, C]`` -> ``[B, C, H, W]``; tokens behind these, which are of references, are left out."""
    return tokens[:, : size[0] * size[1]].transpose(1, 2).unflatten(2, size).contiguous()


def _last_image(tokens: Tensor, size: Pair) -> Tensor:
    """:func:`to_image` where text comes before the canvas."""
    return to_image(tokens[:, -size[0] * size[1] :], size)


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # ids -> tokens of the canvas, its width, ids out of place


def raster(given: Tensor) -> Pair:
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


def positions(first: Tensor, tiles: Tensor) -> Tensor:
    """Ids ``[..., h*w, n]`` of a tile's tokens, from the canvas' first ``[..., 1, n]`` on; columns 1, 2 are y and x."""
    rows, columns = (torch.arange(n, device=tiles.device) for n in tiles.shape[2:])
    ids = first.repeat_interleave(len(rows) * len(columns), -2)
    ids[..., 1:3] += torch.cartesian_prod(rows, columns).to(ids.dtype)
    return ids


def _ids_size(arguments: Arguments) -> Pair:
    tokens, ids = arguments["hidden_states"], arguments["img_ids"]
    if tokens.shape[1] != ids.shape[-2]:
        raise ValueError(f"img_ids of {ids.shape[-2]} tokens for {tokens.shape[1]} tokens")
    if arguments.get("num_ref_tokens") or arguments.get("kv_cache") is not None:
        raise ValueError("kv_cache: keys of reference images are kept from step to step, which tiles cannot share")
    return raster(ids)


def _ids(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    ids, others = arguments["img_ids"], arguments.get("references")
    behind = 0 if others is None else others.shape[1]
    one = ids[0] if ids.ndim == 3 else ids
    own = torch.cat([positions(one[:1], tiles), one[len(one) - behind :]])
    text, extra = arguments["encoder_hidden_states"].shape[1], arguments.get("joint_attention_kwargs")

    def cut(given: Arguments) -> Arguments:
        """A mask ``[..., T + N]`` of the tokens of text and images, without those of other tiles."""
        if (mask := given.get("attention_mask")) is None or mask.shape[-1] <= text:
            return {}
        kept = mask[..., : text + tiles.shape[2] * tiles.shape[3]]
        return {"attention_mask": torch.cat([kept, mask[..., mask.shape[-1] - behind :]], -1)}

    changed = {"img_ids": own.expand(len(tiles), -1, -1) if ids.ndim == 3 else own} | cut(arguments)
    return changed | ({"joint_attention_kwargs": extra | cut(extra)} if extra else {})


IDS: dict[str, Any] = {
    "packed": True,
    "patch": lambda network: 2,  # packed by the pipeline: the network's own patch_size is 1
    "clock": lambda timesteps: timesteps / 1000,
    "size": _ids_size,
    "read": to_image,
    "write": to_tokens,
    "also": _ids,
}
"""Tokens of 2x2 latent pixels, and ``img_ids`` ``[N, n]``: (image, y, x, ...) of each."""


def _behind_text(arguments: Arguments) -> Arguments:
    text = arguments["encoder_hidden_states"].shape[1]
    return {**arguments, "img_ids": arguments["position_ids"][text:]}


def _krea(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    text = arguments["position_ids"][: arguments["encoder_hidden_states"].shape[1]]
    return {"position_ids": torch.cat([text, _ids(tiles, _behind_text(arguments), pixels)["img_ids"]])}


KREA: dict[str, Any] = {**IDS, "size": lambda arguments: _ids_size(_behind_text(arguments)), "also": _krea}
"""As :data:`IDS`, with ``position_ids`` of the text before those of the canvas."""


def _shapes_of(arguments: Arguments) -> list[tuple[int, int, int]]:
    """(frames, height, width) of the canvas and of the reference images, in tokens."""
    shapes = arguments["img_shapes"]
    return [shapes[0]] if isinstance(shapes[0][0], int) else list(shapes[0])


def _shapes_size(arguments: Arguments) -> Pair:
    tokens, images = arguments["hidden_states"], _shapes_of(arguments)
    if arguments.get("additional_t_cond") is not None:
        raise ValueError("img_shapes: the layers of a picture (Qwen-Image Layered, up to 1024x1024) cannot be tiled")
    if images[0][0] != 1 or tokens.shape[1] != sum(t * h * w for t, h, w in images):
        raise ValueError(f"img_shapes={images} for {tokens.shape[1]} tokens: frames and layers cannot be tiled")
    return images[0][1:]


def _shapes(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    own, given = (1, *tiles.shape[2:]), arguments["img_shapes"]
    nested = not isinstance(given[0][0], int)
    return {"img_shapes": [[own, *_shapes_of(arguments)[1:]] if nested else own] * len(tiles)}


SHAPES: dict[str, Any] = {**IDS, "size": _shapes_size, "also": _shapes}
"""Tokens of 2x2 latent pixels, and ``img_shapes``: (frames, height, width) of each image."""


def _qwen21_size(arguments: Arguments) -> Pair:
    if len(arguments["img_shapes"][0]) > 1:
        raise ValueError("img_shapes: reference images before the canvas cannot be tiled; leave them out")
    if arguments.get("kv_cache") is not None:
        raise ValueError("kv_cache: tiles cannot share it; call the pipeline with use_kv_cache=False")
    return _shapes_size(arguments)


def _qwen21(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    # A mask of the text's tokens and of each 2x2 of the canvas'.
    text, kept = arguments["encoder_hidden_states"].shape[1], tiles.shape[2] * tiles.shape[3] // 4
    return _shapes(tiles, arguments, pixels) | {"img_mask": arguments["img_mask"][:, : text + kept]}


QWEN21 = SHAPES | {"patch": lambda network: 1, "size": _qwen21_size, "read": _last_image, "also": _qwen21}
"""As :data:`SHAPES`, with tokens of one latent pixel."""


def _glm_size(arguments: Arguments) -> Pair:
    if (caches := arguments.get("kv_caches")) is not None and caches[0].mode in ("write", "read"):
        raise ValueError("image: GLM-Image keeps keys of reference images from step to step, which tiles cannot share")
    return (0, 0)  # an image tells its size


GLM: dict[str, Any] = {"size": _glm_size}
"""An image; with reference images it is refused."""


def hunyuan(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    cosine, grid = arguments["image_rotary_emb"][0], (tiles.shape[2] // 2, tiles.shape[3] // 2)
    base = 512 // 8 // 2  # tokens of 2x2; the size that positions are scaled to
    region = get_resize_crop_region_for_grid(grid, base)
    rotary = get_2d_rotary_pos_embed(cosine.shape[1], region, grid, device=cosine.device, output_type="pt")
    return {"image_rotary_emb": rotary}


def lumina(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    # Those of an image of the native size: the canvas' are scaled to its size.
    rotary = get_2d_rotary_pos_embed_lumina(2 * arguments["image_rotary_emb"].shape[-1], 384, 384)
    return {"image_rotary_emb": rotary.to(tiles.device)}


def omnigen(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    """Positions are one count; images in the text are listed by row."""
    height, width = arguments["canvas_size"]
    positions, mask = arguments["position_ids"], arguments["attention_mask"]
    kept = positions.shape[1] - height * width // 4 + tiles.shape[2] * tiles.shape[3] // 4
    images, each = iter(arguments["input_img_latents"]), len(tiles) // len(positions)
    places: dict[int, Any] = {}
    latents: list[Any] = []
    for row, found in arguments["input_image_sizes"].items():
        own = [next(images) for _ in found]
        places |= dict.fromkeys(range(row * each, (row + 1) * each), found)
        latents += own * each
    changed = {"position_ids": positions[:, :kept].repeat_interleave(each, 0), "attention_mask": mask[:, :kept, :kept]}
    return changed | {"input_image_sizes": places, "input_img_latents": latents}


FRAME: dict[str, Any] = {"read": lambda value, size: value.squeeze(2), "write": lambda image: image.unsqueeze(2)}
"""A video of one frame, ``[B, C, 1, H, W]``."""


def _kandinsky(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    frame, rows, columns = arguments["visual_rope_pos"]
    return {"visual_rope_pos": [frame, rows[: tiles.shape[2] // 2], columns[: tiles.shape[3] // 2]]}


LAST: dict[str, Any] = {
    "read": lambda value, size: value.squeeze(1).movedim(-1, 1),
    "write": lambda image: image.movedim(1, -1).unsqueeze(1),
    "also": _kandinsky,
}
"""A video of one frame, channels last, ``[B, 1, H, W, C]``."""


def _z_image_read(value: Any, size: Pair) -> Tensor:
    images = [one[-1] if isinstance(one, list) else one for one in value]  # Omni: behind its references
    if images[0].shape[1] != 1 or len({image.shape for image in images}) > 1:
        raise ValueError(f"x: images of {[tuple(image.shape) for image in images]}: all must be [C, 1, H, W], one size")
    return torch.stack(images).squeeze(2)


def _z_image(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    if (others := arguments.get("reference_images")) is None:
        return {}
    return {"x": [[*some, tile] for some, tile in zip(others, tiles.unsqueeze(2), strict=True)]}


LIST: dict[str, Any] = {
    "patch": lambda network: network.config.all_patch_size[0],
    "sample": "x",
    "timestep": "t",
    "clock": lambda timesteps: (1000 - timesteps) / 1000,
    "read": _z_image_read,
    "write": lambda image: list(image.unsqueeze(2)),
    "also": _z_image,
}
"""A list of images ``[C, 1, H, W]``, or in Omni of lists: reference images, then this one."""


SIDES: dict[str, Any] = {
    "sample": "sample",
    "patch": lambda network: 2,  # in which the pipeline counts tokens for the schedule
    "read": lambda value, size: torch.cat(value.chunk(2, 3), 1),
    "write": lambda image: torch.cat(image.chunk(2, 1), 3),
}
"""Two images side by side."""


PATCHES = IDS | {
    "clock": lambda timesteps: timesteps,
    "size": lambda arguments: arguments["shape_list"][0][0][1:],
    "read": lambda value, size: to_image(value.flatten(2), size),
    "write": lambda image: to_tokens(image).unflatten(2, (-1, 1, 2, 2)),
    "also": lambda tiles, arguments, pixels: {
        "shape_list": [[(1, *tiles.shape[2:]), *one[1:]] for one in arguments["shape_list"]]
    },
}
"""Tokens ``[B, N, C, 1, 2, 2]``, and ``shape_list``: (frames, height, width) of the canvas and of references."""


def _row_size(arguments: Arguments) -> Pair:
    # Tokens of the canvas come last; those before them are text, whose three positions are the same.
    text = int((arguments["indicator"][0] != arguments["indicator"][0, -1]).sum())
    return raster(arguments["position_ids"][0, text:])


def _row(tiles: Tensor, arguments: Arguments, pixels: int) -> Arguments:
    height, width = arguments["canvas_size"]
    ids, count = arguments["position_ids"], tiles.shape[2] * tiles.shape[3]
    text, ids = ids.shape[1] - height * width, ids.repeat_interleave(len(tiles) // len(ids), 0)
    cut = ("encoder_hidden_states", "segment_ids", "indicator")
    changed: Arguments = {name: arguments[name][:, : text + count] for name in cut}
    changed["position_ids"] = torch.cat([ids[:, :text], positions(ids[:, text : text + 1], tiles)], 1)
    return changed | {"hidden_states": pad(to_tokens(tiles), (0, 0, text, 0))}


ROW = IDS | {
    "clock": lambda timesteps: 1 - timesteps / 1000,
    "size": _row_size,
    "read": _last_image,
    "also": _row,
    "text_first": True,
}
"""One row of tokens, text, then the canvas, with ``position_ids [B, L, 3]``."""
