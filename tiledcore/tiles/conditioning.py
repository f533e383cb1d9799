"""What a network gets beside the canvas, cut to tiles: tensors with an entry per image are repeated, images cropped."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tiledcore import ops
from tiledcore._diffusers import named
from tiledcore.geometry import Pair, Tiling
from tiledcore.tiles.layouts import Arguments, to_image, to_tokens
from tiledcore.utils import to_device

WHOLE = (
    *("img_ids", "txt_ids", "position_ids", "image_rotary_emb", "visual_rope_pos", "text_rope_pos"),
    *("input_img_latents", "scale"),
)
"""As they are, or replaced by the family."""
LISTS = ("x", "cap_feats", "siglip_feats", "image_noise_mask", "reference_images", "img_shapes", "shape_list")
"""Lists with an entry per image."""
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
LATER = (torch.zeros(1),)
"""What a pipeline gets and passes on for the residuals of the canvas, which nobody computes."""
TEXTS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "added_cond_kwargs")
"""What depends on the prompt."""


class TileBatch(NamedTuple):
    """Tiles of one size that the network gets in one call: the unit that is dealt to several processes.

    Their arguments are branch-major: all tiles of the first image, then of the next. Pipelines build their batches like
    this, and PAG, GLIGEN and others split a batch by branch.
    """

    offsets: Tensor  # ``[T, 2]`` int32, (y, x) in canvas pixels
    tile: Pair
    canvas: Pair
    batch: int  # Images of the canvas, with their guidance branches
    pixels: int  # Image pixels per canvas pixel
    impl: ops.Impl | None = None
    images: slice = slice(None)  # Of the canvas: one guidance branch, or all
    first: int = 0  # How many tiles of this size come before

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, h, w)`` of its predictions ``[N, C', h, w]``: a tile for each of the images."""
        return (len(self.offsets) * len(range(self.batch)[self.images]), *self.tile)

    def repeat(self, value: Tensor) -> Tensor:
        """``[batch, ...]`` -> ``[N, ...]``; a tensor that is not per image stays as it is."""
        if not value.ndim or len(value) != self.batch:
            return value
        return value[self.images].repeat_interleave(len(self.offsets), 0)  # a copy: functions may write into it

    def fit(self, value: Tensor) -> Tensor:
        """An argument of unknown meaning: an image of the canvas' size is cropped, another tensor repeated."""
        return self.crop(value) if value.ndim == 4 and value.shape[2:] == self.canvas else self.repeat(value)

    def gather(self, canvas: Tensor) -> Tensor:
        """The tiles ``[N, C, h, w]`` of a canvas ``[batch, C, H, W]``."""
        some = canvas[self.images]
        return swap_major(ops.gather_tiles(some, self.offsets, self.tile, impl=self.impl), len(self.offsets), len(some))

    def put(self, tiles: Tensor, canvas: Tensor) -> None:
        """Write tiles ``[T, images, C, h, w]`` that do not overlap where they belong on ``[batch, C, H, W]``."""
        y, x = (
            (start[:, None] + torch.arange(side, device=canvas.device)) % size
            for start, side, size in zip(self.offsets.T, self.tile, self.canvas, strict=True)
        )
        places, rows = (y[:, :, None] * self.canvas[1] + x[:, None]).flatten(), tiles.permute(1, 2, 0, 3, 4).flatten(2)
        canvas[self.images].flatten(2).scatter_(2, places.expand_as(rows), rows)

    def crop(self, image: Tensor) -> Tensor:
        """Each tile's part of an image ``[B, C, (1,) H, W]`` of any resolution, or of tokens ``[B, N(, C)]``."""
        if image.ndim == 5:
            return self.crop(image.squeeze(2)).unsqueeze(2)
        if image.ndim == 3:
            return to_tokens(self.crop(to_image(image, self._tokens(image.shape[1]))))
        if image.ndim == 2:
            return self.crop(image[..., None].float())[..., 0].to(image.dtype)
        sizes = list(zip(image.shape[2:], self.canvas, strict=True))
        if any(n % whole and whole % n for n, whole in sizes):
            raise ValueError(f"an image of {tuple(image.shape[2:])} is no multiple of the canvas of {self.canvas}")
        places = [at.long() * n // whole for at, (n, whole) in zip(self.offsets.T, sizes, strict=True)]
        height, width = (side * n // whole for side, (n, whole) in zip(self.tile, sizes, strict=True))
        part = self._replace(offsets=torch.stack(places, 1).int(), tile=(height, width))
        return part.gather(image.expand(self.batch, *image.shape[1:]))

    def _tokens(self, count: int) -> Pair:
        """The grid of ``count`` tokens of the canvas."""
        side = math.isqrt(self.canvas[0] * self.canvas[1] // max(1, count)) or 1
        size = (self.canvas[0] // side, self.canvas[1] // side)
        if (size[0] * side, size[1] * side) != self.canvas or size[0] * size[1] != count:
            raise ValueError(f"{count} tokens for a canvas of {self.canvas}: these are not the canvas' own")
        return size

    def mask(self, mask: Tensor) -> Tensor:
        """Each tile's part of a mask ``[1, n, H, W]``, whose size need not be a multiple of the canvas'."""
        size = [max(1, n // whole) * whole for n, whole in zip(mask.shape[2:], self.canvas, strict=True)]
        return self.crop(F.interpolate(to_device(mask, self.offsets.device), size, mode="nearest-exact"))

    def size(self, like: Tensor) -> Tensor:
        """``[N, 2]``: (height, width) of each tile, in image pixels."""
        return torch.stack([like.new_full(self.shape[:1], n * self.pixels) for n in self.tile], 1)

    def meta(self, given: Tensor) -> Tensor:
        """HunyuanDiT's original, target and crop size."""
        return torch.cat([self.repeat(given[:, :2]), self.size(given), self.repeat(given[:, 4:])], 1)

    def time_ids(self, given: Tensor) -> Tensor:
        """SDXL's size and crop conditions (Podell et al. 2023, 2.2), in image pixels: a tile is a crop of the canvas.

        Columns: original (height, width), crop (top, left), target (height, width) or, in the refiner, a score.
        DreamLite's are (width, height).
        """
        if given.shape[1] == 2:
            return self.size(given).flip(1)
        ids = self.repeat(given).clone()
        ids[:, 2:4] += (self.offsets * self.pixels).to(ids.dtype).repeat(self.shape[0] // len(self.offsets), 1)
        if ids.shape[1] == 6:
            ids[:, 4] *= self.tile[0] / self.canvas[0]
            ids[:, 5] *= self.tile[1] / self.canvas[1]
        return ids

    def boxes(self, boxes: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """GLIGEN's boxes ``[N, n, 4]`` (left, top, right, bottom, 0 to 1) of the canvas in each tile's coordinates.

        Those that a tile does not see are 0, and so are their ``masks [N, n]``.
        """
        size, tile = (boxes.new_tensor([x, y, x, y]) for y, x in (self.canvas, self.tile))
        start = self.offsets.flip(1).repeat(len(boxes) // len(self.offsets), 2)[:, None].to(boxes)
        edges = ((boxes * size - start) / tile).clamp(0, 1)
        seen = (edges[..., 2:] > edges[..., :2]).all(-1)
        return {"boxes": edges * seen[..., None], "masks": masks * seen.to(masks)}


Cuts = Mapping[str, Callable[[TileBatch, Tensor], Tensor]]
CUT: Cuts = {
    **dict.fromkeys((*RESIDUALS, ADAPTER, "controlnet_cond", "control_context", "hint"), TileBatch.crop),
    **dict.fromkeys(("prior_token_id", "prior_token_drop"), TileBatch.crop),
    "padding_mask": lambda part, given: given[..., : part.tile[0] * part.pixels, : part.tile[1] * part.pixels],
    "ip_adapter_masks": TileBatch.mask,
    "args": TileBatch.fit,
    "time_ids": TileBatch.time_ids,
    "image_meta_size": TileBatch.meta,
    **dict.fromkeys(("target_size", "original_size", "resolution"), TileBatch.size),  # CogView, GLM, PixArt
    "crop_coords": lambda part, given: torch.zeros_like(part.size(given)),
    "aspect_ratio": lambda part, given: given.new_full((part.shape[0], 1), part.tile[0] / part.tile[1]),
}
"""How tensors of these names are cut; several may be in a list. All others are repeated."""
More = Callable[[TileBatch, Arguments], Arguments]
"""``(tiles, their arguments so far)`` -> arguments of these tiles that are computed for them."""


def conditions(arguments: Arguments, part: TileBatch, cut: Cuts = CUT) -> Arguments:
    """The arguments of a network for some tiles; entries of dicts are treated by their names too.

    ``per_tile`` among them is a list of :data:`More`. ``cut``: how what is not repeated is cut, by name.
    """
    out: Arguments = {}
    for name, value in arguments.items():
        if value is None or name in WHOLE:
            out[name] = value
        elif isinstance(value, dict):
            out[name] = conditions(value, part, cut)
        elif name in LISTS:
            out[name] = [one for one in value[part.images] for _ in range(len(part.offsets))]
        elif name == "encoder_hidden_states_llama3":  # ``[layers, B, L, D]``
            out[name] = torch.stack([part.repeat(layer) for layer in value])
        else:
            out[name] = tree_map_only(Tensor, partial(cut.get(name, TileBatch.repeat), part), value)
    if cut and "boxes" in out:
        out |= part.boxes(out["boxes"], out["masks"])
    for more in out.pop("per_tile", ()):
        out |= more(part, out)
    return out


def images_of(arguments: Arguments, images: slice, batch: int) -> Arguments:
    """The arguments of some images of ``batch`` alone; tensors may be in lists and dicts, as adapters' are."""
    return conditions(arguments, TileBatch(torch.zeros(1, 2), (0, 0), (0, 0), batch, 1, images=images), {})


class ControlHook:
    """Around the calls of a pipeline's ControlNet, or several in one module: it runs on each tile batch.

    A call only keeps its arguments. The network's call that follows asks for the residuals of its tile batches, so that
    memory and positions are those of a tile. In canvas mode, on one tile, and in guess mode, whose residuals the
    pipeline changes, it runs on the canvas as in diffusers.
    """

    def __init__(self, hook: Any, network: Any) -> None:
        self.hook, self.family, self._network = hook, hook.family, network  # a NetworkHook
        self._waiting: tuple[Callable[..., Any], Arguments] | None = None

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = named(self._network, args, kwargs)
        denoiser, canvas = self.hook.denoiser, self.family.canvas(arguments)
        time = self.hook.time(arguments[self.family.timestep])
        tiling = denoiser.tiling(canvas.shape[2], canvas.shape[3], time)
        self._waiting = None
        if denoiser.config.mode == "canvas" or arguments.get("guess_mode") or len(tiling) == 1:
            return call(*args, **kwargs)
        self._waiting = (call, arguments)
        return LATER, LATER

    def take(self, arguments: Arguments) -> Arguments:
        """A network's arguments, in which residuals that wait are computed with each tile batch."""
        names = [name for name in RESIDUALS if arguments.get(name) is not None]
        if self._waiting is None or not names:
            return arguments
        call, waiting = self._waiting
        family, canvas = self.family, self.family.canvas(waiting)
        given = {name: value for name, value in waiting.items() if name != family.sample}
        # Text that the pipeline gave to both: the network's may be that of a region or of a tile.
        texts = [name for name in TEXTS if given.get(name) is not None and given[name] is arguments.get(name)]

        def residuals(part: TileBatch, inputs: Arguments) -> Arguments:
            if canvas.shape[2:] != part.canvas or len(canvas) != part.batch:
                raise ValueError(
                    f"controlnet: was given a canvas of {tuple(canvas.shape)}, and the network one of {part.batch} "
                    f"images of {part.canvas}; they must be the same"
                )
            own = conditions(given, part) | {name: inputs[name] for name in texts}
            result = call(**own | family.tiles(part.gather(canvas), own, part.pixels))
            return dict(zip(names, result, strict=False)) if isinstance(result, tuple) else {names[0]: result}

        return {name: arguments[name] for name in arguments if name not in names} | {"per_tile": (residuals,)}


def swap_major(rows: Tensor, outer: int, inner: int) -> Tensor:
    """``[outer * inner, ...]`` -> ``[inner * outer, ...]``: tile-major to branch-major, or back."""
    return rows.unflatten(0, (outer, inner)).transpose(0, 1).flatten(0, 1)


def check_residuals(kwargs: Arguments, tiling: Tiling) -> None:
    """ValueError unless tiles begin and end between a residual's pixels at every level; names the nearest canvas."""
    canvas = (tiling.height, tiling.width)
    where = f"ControlNet or adapter on a canvas of {canvas[0]}x{canvas[1]} latent pixels"
    images = tree_leaves([kwargs.get(name) for name in (*RESIDUALS[:2], ADAPTER)])
    for size in sorted({one.shape[2:] for one in images if isinstance(one, Tensor)}):  # the coarsest first
        if any(whole % n for whole, n in zip(canvas, size, strict=True)):
            factor = max(2 ** round(math.log2(whole / n)) for whole, n in zip(canvas, size, strict=True))
            nearest = "x".join(str(max(1, round(n / factor)) * factor) for n in canvas)
            raise ValueError(f"{where}: both sides must be multiples of {factor}; the nearest such canvas is {nearest}")
        for whole, n, parts in zip(canvas, size, (tiling.rows, tiling.cols), strict=True):
            if any(at % (whole // n) for part in parts for at in part):
                raise ValueError(
                    f"{where}: tiles must begin and end at multiples of {whole // n}; choose tile and overlap so, and "
                    "motion='still'"
                )
