"""Connected images: sets of images whose edges fit together (Tiled Diffusion: Madar and Fried, 2025).

All images are denoised together. Before each network call every canvas is padded with strips of its neighbours, and
the padding is cut off the prediction. If a side has several possible neighbours, each step draws one of them; the
sides of such a group also share one strip of latents.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tiledcore.compose.regional import drawn_latents
from tiledcore.config import Motion, TilingConfig
from tiledcore.geometry import Pair, both
from tiledcore.hook import default_tiling, tiled, with_fade
from tiledcore.tiles.denoiser import Forward, Prediction, TileDenoiser, Time
from tiledcore.tiles.families import network_of
from tiledcore.utils import replaced
from tiledcore.vae.wrap import Continuation, decoder_reach, wrapped

SHARED = 5  # width in latent pixels of the strip that a group of sides shares, as in the paper
Partners = dict[str, tuple[list[int], list[int]]]
"""Per axis: for each image, the image before it (left, above) and the image behind it (right, below)."""


@dataclass(frozen=True)
class Joint:
    """Edges that fit: each right (bottom) side of ``before`` continues in each left (top) side of ``behind``.

    ``axis`` is ``"x"`` for images side by side, ``"y"`` for one above the other; the others are indices of images.
    ``Joint("x", (0,), (0,))`` is an image that repeats.
    """

    axis: Literal["x", "y"]
    before: tuple[int, ...]
    behind: tuple[int, ...]


class CanvasGraph:
    """Which edges of images of one size fit. On an axis with joints, each side of each image is in one of them."""

    def __init__(self, images: int, joints: Sequence[Joint]) -> None:
        if images < 1:
            raise ValueError(f"images={images}: must be at least 1")
        if not joints:
            raise ValueError("joints: must be at least one Joint")
        self.images, self.joints, self.axes = images, tuple(joints), {joint.axis for joint in joints}
        for joint in joints:
            numbers = (*joint.before, *joint.behind)
            if joint.axis not in ("x", "y"):
                raise ValueError(f"axis={joint.axis!r}: must be x or y")
            if not joint.before or not joint.behind or any(not 0 <= i < images for i in numbers):
                raise ValueError(f"{joint}: needs images on both sides, numbered from 0 to {images - 1}")
        for axis, name in product(sorted(self.axes), ("before", "behind")):
            used = sorted(i for joint in joints if joint.axis == axis for i in getattr(joint, name))
            if used != list(range(images)):
                raise ValueError(f"joints: along {axis}, {name} has images {used}, and must have each of them once")

    def on_axes(self, reach: Pair) -> Pair:
        """``reach`` (y, x), with 0 for an axis without joints."""
        return reach[0] * ("y" in self.axes), reach[1] * ("x" in self.axes)

    def partners(self, random: Random | None) -> Partners:
        """One neighbour for each side: drawn at random; without a generator the image itself, or else the first."""
        found: Partners = {axis: ([0] * self.images, [0] * self.images) for axis in sorted(self.axes)}
        for joint in self.joints:
            sides = (joint.behind, joint.before)
            for here, others, neighbours in zip(sides, sides[::-1], found[joint.axis], strict=True):
                for i in here:
                    # random() is the only method whose values are the same in all Python versions.
                    at = int(random.random() * len(others)) if random else others.index(i) if i in others else 0
                    neighbours[i] = others[at]
        return found

    def share(self, canvases: Tensor, width: int, random: Random) -> Tensor:
        """Give all sides of a group the strip of one of them, drawn at random. In corners the last axis wins."""
        groups = canvases.unflatten(0, (-1, self.images)).clone()
        for joint in self.joints:
            d = -2 if joint.axis == "y" else -1
            for sides, start in ((joint.before, groups.shape[d] - width), (joint.behind, 0)):
                if len(sides) > 1:
                    strips = groups.narrow(d, start, width)
                    strips[:, list(sides)] = strips[:, [sides[int(random.random() * len(sides))]]]
        return groups.flatten(0, 1)


@dataclass(frozen=True)
class Beside(Continuation):
    """Each image is continued by its neighbours."""

    partners: Partners

    def pad(self, canvas: Tensor, pixels: int = 1) -> Tensor:
        """Pad each canvas ``[k * images, C, H, W]`` with pixels of its neighbours."""
        groups = canvas
        for axis, (before, behind) in self.partners.items():  # x, then y
            d, n = (-2, self.reach[0] * pixels) if axis == "y" else (-1, self.reach[1] * pixels)
            groups = groups.unflatten(0, (-1, len(before)))
            start, end = groups[:, before].narrow(d, groups.shape[d] - n, n), groups[:, behind].narrow(d, 0, n)
            groups = torch.cat([start, groups, end], d).flatten(0, 1)
        return groups


class ConnectedDenoiser(TileDenoiser):
    """A :class:`TileDenoiser` for a batch of connected images; ``reach`` in canvas pixels, 0 where nothing joins."""

    def __init__(self, graph: CanvasGraph, reach: Pair, *settings: Any) -> None:
        super().__init__(*settings)
        self.graph, self.reach = graph, reach

    def place(self, size: Pair, timestep: Time, device: torch.device) -> bool:
        y, x = self.reach
        return super().place((size[0] + 2 * y, size[1] + 2 * x), timestep, device)

    def evaluate(self, forward: Forward, sample: Tensor, timestep: Time, **kwargs: Any) -> Prediction:
        # Seeded by the timestep, so that both guidance branches of a step see the same neighbours.
        step = round(1000 * float(torch.as_tensor(timestep).flatten()[0]))
        random = Random(f"connected/{(self.config.moving or Motion()).seed}/{step}")
        around = Beside(self.reach, 1, self.graph.partners(random))
        canvases = around.crop(self.blended(super().evaluate(forward, around.pad(sample), timestep, **kwargs)))
        return self.whole(self.graph.share(canvases, -(-SHARED // self.unit), random))


def connected(
    pipe: Any,
    prompts: Sequence[str],
    joints: Sequence[Joint],
    *,
    height: int,
    width: int,
    seed: int = 0,
    context: int | None = None,
    tiling: TilingConfig | None = None,
    **call: Any,
) -> list[Any]:
    """Make a set of images whose edges fit.

    Args:
        pipe: a text-to-image pipeline, or a ``TiledPipeline``. Its own loop and scheduler run. With a scheduler that
            draws noise in each step, the strips of a group differ.
        prompts: one per image.
        joints: their edges, see :class:`CanvasGraph`.
        height: of each image, px.
        width: of each image, px.
        seed: image i uses ``seed + i``.
        context: latent pixels that an image sees of its neighbours. Default: a quarter of the tile.
        tiling: how each image is tiled; without ``wrap``.
        call: other arguments of the pipeline.

    Raises:
        ValueError: names the argument, its value and what is valid.
        TypeError: the pipeline cannot be tiled.
    """
    tiling = tiling or getattr(pipe, "tiling", None) or default_tiling(pipe)
    pipe, execution = getattr(pipe, "pipe", pipe), getattr(pipe, "execution", None)
    graph = CanvasGraph(len(prompts), joints)
    if tiling.mode != "tiles" or any(both(tiling.wrap)):
        given = f"mode={tiling.mode!r}, wrap={tiling.wrap}"
        raise ValueError(f"tiling: {given}: connected images need mode='tiles', no wrap")
    network, family = network_of(pipe)
    factor, unit = pipe.vae_scale_factor, family.unit(network)
    smallest = min(both(tiling.tile or family.native(pipe, network)))
    context = smallest // 4 // unit * unit if context is None else context
    most = min(height, width) // factor
    if not unit <= context <= most or context % unit:
        raise ValueError(f"context={context}: must be a multiple of {unit} from {unit} to {most}")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    call |= {"prompt": list(prompts), "height": height, "width": width, "generator": generators}
    shared = partial(graph.share, width=-(-SHARED // unit) * unit, random=Random(f"connected/{seed}"))
    call["latents"] = drawn_latents(pipe, call, shared)
    tiling = with_fade(pipe, tiling, fades=False)
    reach = min(decoder_reach(pipe.vae), height // factor), min(decoder_reach(pipe.vae), width // factor)
    around = Beside(graph.on_axes(reach), factor, graph.partners(None))
    kind = partial(ConnectedDenoiser, graph, graph.on_axes(both(context // unit)))
    with tiled(pipe, tiling, execution, call, kind), wrapped(pipe.vae, around), _shared_statistics(pipe.vae):
        return list(pipe(**call).images)


@contextmanager
def _shared_statistics(network: torch.nn.Module) -> Iterator[None]:
    """Every GroupNorm computes its statistics over the whole batch: else each image would have a tone of its own."""

    def shared(norm: torch.nn.GroupNorm, x: Tensor) -> Tensor:
        one = x.transpose(0, 1).flatten(1)[None]  # [1, C, N * pixels]
        out = F.group_norm(one, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return out[0].unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)

    with ExitStack() as norms:
        for module in network.modules():
            if type(module) is torch.nn.GroupNorm:
                norms.enter_context(replaced(module, forward=partial(shared, module)))
        yield
