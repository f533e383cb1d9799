"""What a network gets beside the canvas, cut to tiles: tensors with an entry per image are repeated, images cropped."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tiledcore import ops
from tiledcore._diffusers import uncompiled
from tiledcore.geometry import Pair, Tiling
from tiledcore.utils import to_device

POSITIONS = ("img_ids", "txt_ids", "position_ids", "image_rotary_emb", "visual_rope_pos", "text_rope_pos")
WHOLE = (*POSITIONS, "padding_mask", "input_img_latents")
"""As they are, or replaced by the family."""
LISTS = ("x", "cap_feats", "siglip_feats", "image_noise_mask", "reference_images", "img_shapes", "shape_list")
"""Lists with an entry per image."""
LAYERS = "encoder_hidden_states_llama3"  # ``[layers, B, L, D]``
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)
"""What a ControlNet adds, in the order in which it gives it: images at the sizes of a UNet's levels, or tokens."""
ADAPTER = "down_intrablock_additional_residuals"
"""What a T2I-Adapter adds: images at the sizes of a UNet's levels, computed from the whole canvas before the steps."""
CROPPED = (*RESIDUALS, ADAPTER, "controlnet_cond", "control_context", "prior_token_id", "prior_token_drop")
"""Images or tokens of the whole canvas, in any resolution; several in a list. See :meth:`TileBatch.crop`."""
ATTENTION = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Dicts for attention layers, see :func:`cut_attention_kwargs`."""

LATER = (torch.zeros(1),)
"""What a pipeline gets and passes on for the residuals of the canvas, which nobody computes."""
TEXTS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "added_cond_kwargs")
"""What depends on the prompt."""


class TileBatch(NamedTuple):
    """Some tiles of one size. Their arguments are branch-major: all tiles of the first image, then of the next.

    Pipelines build their batches like this, and PAG, GLIGEN and others split a batch by branch.
    """

    offsets: Tensor  # ``[T, 2]`` int32, (y, x) in canvas pixels
    tile: Pair
    canvas: Pair
    batch: int  # Images of the canvas, with their guidance branches
    pixels: int  # Image pixels per canvas pixel
    impl: ops.Impl | None = None
    images: slice = slice(None)  # Of the canvas: which ones ``batch`` counts

    def repeat(self, value: Tensor) -> Tensor:
        """``[batch, ...]`` -> ``[batch * T, ...]``; a tensor that is not per image stays as it is."""
        return value.repeat_interleave(len(self.offsets), 0) if value.ndim and len(value) == self.batch else value

    def fit(self, value: Tensor) -> Tensor:
        """An argument of unknown meaning: an image of the canvas' size is cropped, another tensor repeated."""
        return self.crop(value) if value.ndim == 4 and value.shape[2:] == self.canvas else self.repeat(value)

    def gather(self, canvas: Tensor) -> Tensor:
        """The tiles ``[batch * T, C, h, w]`` of a canvas ``[batch, C, H, W]``."""
        tiles = ops.gather_tiles(canvas, self.offsets, self.tile, impl=self.impl)
        return swap_major(tiles, len(self.offsets), self.batch)

    def crop(self, image: Tensor) -> Tensor:
        """Each tile's part of an image ``[B, C, (1,) H, W]`` of any resolution, or of tokens ``[B, N(, C)]``."""
        if image.ndim == 5:
            return self.crop(image.squeeze(2)).unsqueeze(2)
        if image.ndim == 3:
            size = self._tokens(image.shape[1])
            cut = self.crop(image.transpose(1, 2).unflatten(2, size).contiguous())
            return cut.flatten(2).transpose(1, 2).contiguous()
        if image.ndim == 2:
            return self.crop(image[..., None].float())[..., 0].to(image.dtype)
        image = image.expand(self.batch, *image.shape[1:])
        sizes = list(zip(image.shape[2:], self.canvas, strict=True))
        if image.shape[2] < self.canvas[0]:
            _level(image, self.canvas)
        elif any(n % whole for n, whole in sizes):
            raise ValueError(f"an image of {tuple(image.shape[2:])} is no multiple of the canvas of {self.canvas}")
        up, down = ([max(1, n // whole) for n, whole in sizes], [max(1, whole // n) for n, whole in sizes])
        places = torch.stack([self.offsets[:, i] * up[i] // down[i] for i in (0, 1)], 1)
        tile = (self.tile[0] * up[0] // down[0], self.tile[1] * up[1] // down[1])
        return self._replace(offsets=places, tile=tile).gather(image)

    def _tokens(self, count: int) -> Pair:
        """The grid of ``count`` tokens of the canvas."""
        side = math.isqrt(self.canvas[0] * self.canvas[1] // max(1, count)) or 1
        size = (self.canvas[0] // side, self.canvas[1] // side)
        if (size[0] * side, size[1] * side) != self.canvas or size[0] * size[1] != count:
            raise ValueError(f"{count} tokens for a canvas of {self.canvas}: these are not the canvas' own")
        return size


More = Callable[[TileBatch, dict[str, Any]], dict[str, Any]]
"""``(tiles, their arguments so far)`` -> arguments of these tiles that are computed for them."""


def conditions(arguments: dict[str, Any], part: TileBatch) -> dict[str, Any]:
    """The arguments of a network for some tiles; ``per_tile`` among them is a list of :data:`More`."""
    out = dict(arguments)
    later = out.pop("per_tile", ())
    for name, value in list(out.items()):
        if value is None or name in WHOLE:
            continue
        if name in LISTS:
            out[name] = [one for one in value for _ in range(len(part.offsets))]
        elif name == LAYERS:
            out[name] = value.repeat_interleave(len(part.offsets), 1)
        elif name in ATTENTION:
            out[name] = cut_attention_kwargs(value, part)
        else:
            cut = part.crop if name in CROPPED else part.fit if name == "args" else part.repeat
            out[name] = tree_map_only(Tensor, cut, value)
    added = arguments.get("added_cond_kwargs") or {}
    if (time_ids := added.get("time_ids")) is not None and time_ids.shape[1] > 2:
        out["added_cond_kwargs"]["time_ids"] = _time_ids(time_ids, part)
    if "hint" in added:  # Kandinsky's image of the whole canvas
        out["added_cond_kwargs"]["hint"] = part.crop(added["hint"])
    for more in later:
        out |= more(part, out)
    return out


def images_of(arguments: dict[str, Any], images: slice, batch: int) -> dict[str, Any]:
    """The arguments of some images of ``batch`` alone; tensors may be in lists and dicts, as adapters' are."""

    def cut(value: Tensor) -> Tensor:
        return value[images] if value.ndim and value.shape[0] == batch else value

    out = dict(arguments)
    for name, value in arguments.items():
        if value is None or name in (*WHOLE, "per_tile", "regions"):
            continue
        if name in LISTS:
            out[name] = value[images]
        elif name == LAYERS:
            out[name] = value[:, images]
        else:
            out[name] = tree_map_only(Tensor, cut, value)
    return out


class ControlHook:
    """Around the calls of a pipeline's ControlNet, or several in one module: it runs on each tile batch.

    A call only keeps its arguments. The network's call that follows asks for the residuals of its tile batches: so the
    memory that a ControlNet takes is that of a tile batch, and it sees positions that it was trained on. A second
    guidance branch in a call of its own evaluates it again. In canvas mode, on one tile, and in guess mode, whose
    residuals the pipeline changes, it runs on the canvas as in diffusers.
    """

    def __init__(self, hook: Any, network: Any) -> None:
        self.hook, self.family = hook, hook.family  # a NetworkHook
        self._network, self._parameters = network, signature(type(uncompiled(network)).forward)
        self._waiting: tuple[Callable[..., Any], dict[str, Any]] | None = None

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self._parameters.bind(self._network, *args, **kwargs).arguments)
        arguments.pop("self")
        denoiser, canvas = self.hook.denoiser, self.family.canvas(arguments)
        time = self.hook.time(arguments[self.family.timestep])
        tiling = denoiser.tiling(canvas.shape[2], canvas.shape[3], time)
        self._waiting = None
        if denoiser.config.mode == "canvas" or arguments.get("guess_mode") or len(tiling) == 1:
            return call(*args, **kwargs)
        self._waiting = (call, arguments)
        return LATER, LATER

    def take(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A network's arguments, in which residuals that wait are computed with each tile batch."""
        names = [name for name in RESIDUALS if arguments.get(name) is not None]
        if self._waiting is None or not names:
            return arguments
        call, waiting = self._waiting
        family, whole = self.family, self.family.canvas(waiting)
        # Text that the pipeline gave to both: the network's may be that of a region or of a tile.
        texts = [name for name in TEXTS if waiting.get(name) is not None and waiting[name] is arguments.get(name)]

        def residuals(part: TileBatch, inputs: dict[str, Any]) -> dict[str, Any]:
            given, canvas = waiting, whole
            if part.images != slice(None):
                given, canvas = images_of(given, part.images, len(canvas)), canvas[part.images]
            if canvas.shape[2:] != part.canvas or len(canvas) != part.batch:
                raise ValueError(
                    f"controlnet: was given a canvas of {tuple(canvas.shape)}, and the network one of {part.batch} "
                    f"images of {part.canvas}; they must be the same"
                )
            own = conditions({name: given[name] for name in given if name != family.sample}, part)
            own |= {name: inputs[name] for name in texts}
            result = call(**own | family.tiles(part.gather(canvas), own, part.pixels))
            return dict(zip(names, result, strict=False)) if isinstance(result, tuple) else {names[0]: result}

        return {name: arguments[name] for name in arguments if name not in names} | {"per_tile": (residuals,)}


def swap_major(rows: Tensor, outer: int, inner: int) -> Tensor:
    """``[outer * inner, ...]`` -> ``[inner * outer, ...]``: tile-major to branch-major, or back."""
    return rows.unflatten(0, (outer, inner)).transpose(0, 1).flatten(0, 1)


def check_residuals(kwargs: dict[str, Any], tiling: Tiling, canvas: Pair) -> None:
    """ValueError unless tiles begin and end between a residual's pixels at every level; names the nearest canvas."""
    images = tree_leaves([kwargs.get(name) for name in (*RESIDUALS[:2], ADAPTER)])
    levels = {_level(one, canvas) for one in images if isinstance(one, Tensor)}
    for size, places in tiling.groups.items():
        for fy, fx in levels:
            if size[0] % fy or size[1] % fx or any(y % fy or x % fx for y, x in places):
                raise ValueError(
                    f"ControlNet or adapter on a canvas of {canvas[0]}x{canvas[1]} latent pixels: tiles must begin and "
                    f"end at multiples of {max(fy, fx)}; choose tile and overlap so, and motion='still'"
                )


def _level(residual: Tensor, canvas: Pair) -> Pair:
    """Canvas pixels per pixel of a residual, along both axes."""
    height, width = canvas[0] // residual.shape[2], canvas[1] // residual.shape[3]
    if (residual.shape[2] * height, residual.shape[3] * width) != canvas:
        factor = max(2 ** round(math.log2(n / m)) for n, m in zip(canvas, residual.shape[2:], strict=True))
        nearest = "x".join(str(max(1, round(n / factor)) * factor) for n in canvas)
        raise ValueError(
            f"ControlNet or adapter on a canvas of {canvas[0]}x{canvas[1]} latent pixels: both sides must be multiples "
            f"of {factor}; the nearest such canvas is {nearest}"
        )
    return height, width


def _time_ids(time_ids: Tensor, part: TileBatch) -> Tensor:
    """SDXL's size and crop conditions (Podell et al. 2023, 2.2), in image pixels: a tile is a crop of the canvas.

    Columns: original (height, width), crop (top, left), target (height, width) or, in the refiner, a score.
    """
    ids = time_ids.repeat_interleave(len(part.offsets), 0)
    ids[:, 2:4] += (part.offsets * part.pixels).to(ids.dtype).repeat(len(time_ids), 1)
    if ids.shape[1] == 6:
        ids[:, 4] *= part.tile[0] / part.canvas[0]
        ids[:, 5] *= part.tile[1] / part.canvas[1]
    return ids


def cut_attention_kwargs(given: dict[str, Any], part: TileBatch) -> dict[str, Any]:
    """Arguments of attention layers for some tiles: image prompts are repeated, masks and boxes are cut.

    ``given`` are the canvas': ``ip_adapter_image_embeds``, ``ip_hidden_states``: tensors ``[B, ...]`` or a list;
    ``ip_adapter_masks``: ``[1, images, H, W]`` in any resolution, or a list of such; ``gligen``: ``boxes [B, N, 4]``
    (left, top, right, bottom, 0 to 1), ``masks [B, N]`` and others.
    """
    changed = dict(given)  # a copy, because networks take entries out of it
    for name in ("ip_adapter_image_embeds", "ip_hidden_states", "attention_mask"):
        if name in given:
            changed[name] = tree_map_only(Tensor, part.repeat, given[name])
    if "ip_adapter_masks" in given:
        changed["ip_adapter_masks"] = tree_map_only(
            Tensor, lambda mask: _cut_mask(mask, part), given["ip_adapter_masks"]
        )
    if (gligen := given.get("gligen")) is not None and "boxes" in gligen:
        parts = {name: value.repeat_interleave(len(part.offsets), 0) for name, value in gligen.items()}
        boxes, seen = _cut_boxes(parts["boxes"], part.offsets.repeat(part.batch, 1), part.tile, part.canvas)
        changed["gligen"] = parts | {"boxes": boxes, "masks": parts["masks"] * seen.to(parts["masks"])}
    return changed


def _cut_mask(mask: Tensor, part: TileBatch) -> Tensor:
    """``[1, n, H, W]`` -> ``[batch * T, n, h, w]``: what each tile sees of a mask of the canvas, at its resolution."""
    axes, device = [], part.offsets.device
    for start, side, whole, size in zip(part.offsets.T, part.tile, part.canvas, mask.shape[2:], strict=True):
        count = max(1, round(side * size / whole))
        at = start[:, None] + (torch.arange(count, device=device) + 0.5) * side / count
        axes.append((at * size / whole).long() % size)
    image = to_device(mask[0], device)
    seen = torch.stack([image[:, rows[:, None], columns] for rows, columns in zip(*axes, strict=True)])
    return seen.repeat(part.batch, 1, 1, 1)


def _cut_boxes(boxes: Tensor, offsets: Tensor, tile: Pair, canvas: Pair) -> tuple[Tensor, Tensor]:
    """Boxes ``[R, N, 4]`` of the canvas in coordinates of each row's tile, and which of them it sees, ``[R, N]``."""
    edges = []
    for edge, axis in zip(boxes.unbind(-1), (1, 0, 1, 0), strict=True):
        start = offsets[:, axis, None].to(boxes)
        edges.append(((edge * canvas[axis] - start) / tile[axis]).clamp(0, 1))
    left, top, right, bottom = edges
    seen = (right > left) & (bottom > top)
    return torch.stack(edges, -1) * seen[..., None], seen
