"""Canvas mode: the network runs once over the whole canvas, and its self-attention becomes neighbour attention.

Time and memory of attention are then linear in the canvas' area. Everything else of the network stays as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial, wraps
from inspect import signature
from itertools import chain
from threading import get_ident
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tiledcore import _diffusers
from tiledcore._diffusers import ADDED, CROSS, JOINT, SELF, TEXT_MULTIPLE, PatchEmbed, uncompiled
from tiledcore.canvas import processors
from tiledcore.canvas.windows import Canvas, Rotary, Windows
from tiledcore.config import Execution, TilingConfig
from tiledcore.geometry import Pair, both
from tiledcore.tiles.conditioning import images_of
from tiledcore.tiles.families import FAMILIES
from tiledcore.utils import around_of, intercept, release


class CanvasAttention:
    """Canvas mode of one network; made by :func:`install`. ``layers``: names of the replaced layers.

    ``grid``: rows and columns of image tokens, and latent pixels per token, where the caller knows them: FLUX's are
    otherwise read from the device.
    """

    grid: tuple[Pair, int] | None = None

    def __init__(self, network: Any, config: TilingConfig, execution: Execution, native: Pair) -> None:
        self.config, self.native, self.wrap = config, native, both(config.wrap)
        self.guidance_batch, self.canvas = execution.guidance_batch, Canvas(execution.impl)
        self._network = uncompiled(network)
        self._family = next(family for family in FAMILIES if isinstance(self._network, family.model))
        self._masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # Of text -> indices of what counts, or None
        self._names = tuple(signature(type(self._network).forward).parameters)[1:]
        layers = [(name, one) for name, one in self._network.named_modules() if hasattr(one, "set_processor")]
        found = {name: (one, _processor(self._network, self.canvas, name, one)) for name, one in layers}
        self.layers = tuple(name for name, (_, new) in found.items() if new is not None)
        self.undo = ExitStack()  # Puts the former processors and calls back
        for layer, new in map(found.__getitem__, self.layers):  # only now that none of them was refused
            self.undo.callback(layer.set_processor, layer.processor)
            layer.set_processor(_of_this_thread(new, layer.processor))

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        first = next((kwargs[name] for name in ("sample", "hidden_states", "x") if name in kwargs), None)
        if first is None:
            return call(**kwargs)  # which says what is missing
        if self.guidance_batch or len(first) == 1:
            return self._evaluate(call, kwargs)
        return _stack([self._evaluate(call, images_of(kwargs, slice(i, i + 1), len(first))) for i in range(len(first))])

    def _evaluate(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        grid, pixels = self.grid or self._grid(kwargs)
        self.canvas.enter(list(self._levels(grid, pixels)))
        if (mask := kwargs.get("encoder_hidden_states_mask")) is not None:
            if mask not in self._masks:  # a pipeline passes the same one in every step
                texts = self.canvas.texts(mask.bool())
                self._masks[mask] = None if mask.all() else [[row.nonzero()[:, 0] for row in text] for text in texts]
            self.canvas.text_kept = self._masks[mask]
        if "cap_feats" in kwargs:  # behind the padding of the image; a batch has that of the longest
            padded = [-(-len(text) // TEXT_MULTIPLE) * TEXT_MULTIPLE for text in kwargs["cap_feats"]]
            first, device = -grid[0] * grid[1] % TEXT_MULTIPLE, kwargs["cap_feats"][0].device
            self.canvas.text_kept = [[torch.arange(first + n, device=device) for n in padded]]
        return call(**kwargs)

    def _grid(self, kwargs: dict[str, Any]) -> tuple[Pair, int]:
        """Rows and columns of image tokens at the network's entrance, and latent pixels per token."""
        family, patch = self._family, self._family.patch(self._network)
        height, width = family.canvas(kwargs).shape[2:]
        if family.packed and kwargs["hidden_states"].shape[1] != height * width:
            name = next(name for name in ("img_ids", "img_shapes") if name in kwargs)
            raise ValueError(f"{name}: reference images in the sequence need mode='tiles'; canvas mode knows one image")
        return (height, width) if family.packed else (height // patch, width // patch), patch

    def _levels(self, grid: Pair, pixels: int) -> Iterator[Windows]:
        """The windows of each level; sizes are rounded up, as the network's stride-2 convolutions do."""
        unet = isinstance(self._network, diffusers.UNet2DConditionModel)
        canvas = (grid[0] * pixels, grid[1] * pixels)
        tile = self.config.tile_on(canvas, self.native)
        halo = (tile[0] // 2, tile[1] // 2) if self.config.halo is None else both(self.config.halo)
        for level in range(len(self._network.config.block_out_channels) if unet else 1):

            def down(size: Pair, factor: int = pixels * 2**level) -> Pair:
                return -(-size[0] // factor), -(-size[1] // factor)

            yield Windows(down(canvas), down(tile), down(halo), self.wrap, down(self.native))


def _repeat_positions(patch: int, native: Pair, call: Callable[[Tensor], Tensor], latent: Tensor) -> Tensor:
    """Around a :class:`PatchEmbed`: token (y, x) gets the absolute positions of (y mod native, x mod native)."""
    batch, channels, *size = latent.shape
    h, w = (min(n, own) for n, own in zip(size, native, strict=True))
    if [h, w] == size:
        return call(latent)
    # The module embeds each part of native size as an image of its own.
    padded = F.pad(latent, (0, -size[1] % w, 0, -size[0] % h))
    rows, columns = padded.shape[2] // h, padded.shape[3] // w
    parts = padded.view(batch, channels, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5)
    tokens = call(parts.reshape(-1, channels, h, w)).view(batch, rows, columns, h // patch, w // patch, -1)
    grid = tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return grid[:, : size[0] // patch, : size[1] // patch].flatten(1, 2)


def _of_this_thread(new: Any, former: Any) -> Any:
    """The new processor for calls from this thread, the former one for others: they may share the network."""
    thread, kind = get_ident(), type(new)

    @wraps(kind.__call__)  # diffusers passes on what the signature names
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.__call__(self, *args, **kwargs) if get_ident() == thread else former(*args, **kwargs)

    new.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return new


def install(network: Any, config: TilingConfig, execution: Execution, native: Pair) -> CanvasAttention:
    """Make a denoiser run on canvases of any size: its global self-attention becomes neighbour attention.

    Every image token attends to its own tile widened by the halo (see :func:`tiledcore.ops.neighbor_attention`), and to
    all text tokens where the network joins them. A canvas of one tile gives what the plain network gives. Processors,
    LoRA layers and fused projections are taken as they are now. Convolutions do not wrap.

    UNets have no positions. SD3 and PixArt have absolute ones: those of a native picture, repeated. FLUX, Qwen-Image
    and Z-Image have rotary ones (:mod:`tiledcore.canvas.windows`): distances are as in training if ``tile + halo <=
    native``; with ``tile + 2 * halo == native`` also the number of keys, which drifts least from native samples
    (``bench/modes.py``). Sana's attention is linear in the canvas already and stays global.

    ``native``: size (y, x) of the images that the network was trained on, in latent pixels.

    Raises:
        TypeError: the network is of no such class, or one of its layers has a processor that cannot be replaced.
        ValueError: names the argument, its value and what is valid; at the first evaluation also for an image that the
            layers cannot place.
    """
    inner = uncompiled(network)
    if not isinstance(inner, tuple(family.model for family in FAMILIES)):
        names = ", ".join(family.model.__name__ for family in FAMILIES)
        raise TypeError(f"network={type(inner).__name__}: canvas mode knows {names}")
    embed = getattr(inner, "pos_embed", None) or getattr(inner, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.pos_embed is None:  # without absolute positions
        embed = None
    elif any(n % embed.patch_size for n in native):
        raise ValueError(f"native={native} must be multiples of the patch size {embed.patch_size}")
    remove(network)
    hook = CanvasAttention(network, config, execution, native)
    around: list[tuple[Any, Any]] = [(network, hook)]
    if embed is not None:
        around.append((embed, partial(_repeat_positions, embed.patch_size, native)))
    for owner, one in around:
        intercept(owner, one, this_thread=True)
        hook.undo.callback(release, owner, one)
    return hook


def remove(network: Any) -> None:
    """Undo :func:`install`: results are bit-identical to before. Does nothing if it was not done."""
    if (hook := around_of(network, CanvasAttention)) is not None:
        hook.undo.close()


def _processor(network: Any, canvas: Canvas, name: str, layer: Any) -> Any:
    """What stands in for a layer's processor; None where the layer stays as it is."""
    kind = type(layer.processor)
    if kind not in ADDED and getattr(layer, "is_cross_attention", False):
        return processors.CrossProcessor(canvas, layer.processor) if kind in CROSS else None
    if isinstance(network, diffusers.SanaTransformer2DModel):
        return None
    if kind in JOINT and layer.added_kv_proj_dim is not None:
        return processors.JointProcessor(canvas)
    plain = kind in (*SELF, *JOINT) and layer.group_norm is None and not layer.residual_connection
    if plain and layer.inner_kv_dim == layer.inner_dim and not layer.is_causal:
        return processors.SelfProcessor(canvas)
    if kind is _diffusers.FluxAttnProcessor:
        return processors.FluxProcessor(canvas, Rotary(tuple(network.config.axes_dims_rope), network.pos_embed.theta))
    if kind is _diffusers.QwenDoubleStreamAttnProcessor2_0 and not network.config.use_layer3d_rope:
        rotary = Rotary(tuple(network.config.axes_dims_rope), network.pos_embed.theta, network.pos_embed.scale_rope)
        return processors.QwenProcessor(canvas, rotary)
    if kind is _diffusers.ZSingleStreamAttnProcessor:
        if name.startswith(("context_refiner", "siglip_refiner")):  # no image tokens
            return None
        return processors.ZImageProcessor(canvas, Rotary(tuple(network.axes_dims), network.rope_theta))
    raise TypeError(
        f"{name}: {kind.__name__} cannot be replaced by neighbour attention; use tile mode, or remove the adapter "
        f"if one set it (IP-Adapter, PAG, custom diffusion)"
    )


def _stack(outputs: list[Any]) -> Any:
    """One output, of the network's own class, from those of the batch's images."""
    samples = [out[0] for out in outputs]
    together: Any = list(chain.from_iterable(samples)) if isinstance(samples[0], list) else torch.cat(samples)
    return (together,) if isinstance(outputs[0], tuple) else type(outputs[0])(sample=together)
