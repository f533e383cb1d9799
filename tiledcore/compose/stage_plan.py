"""Plan the stages of a staged generation: sizes and strengths, computed without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tiledcore import validate
from tiledcore.geometry import Pair
from tiledcore.schedulers.pull import Pull

Upscaler = Callable[[Tensor, Pair], Tensor]
"""``(image [B, 3, h, w] in 0..1, (H, W))`` -> ``[B, 3, H, W]`` in 0..1."""


@dataclass(frozen=True)
class Stage:
    """One stage makes an image of ``width`` by ``height`` px.

    ``strength`` is the share of the steps that run on the enlarged image, above 0 up to 1; None, in the first stage
    only: generate from noise.
    """

    width: int
    height: int
    strength: float | None

    def __post_init__(self) -> None:
        validate.integer("stages: width", self.width, 1)
        validate.integer("stages: height", self.height, 1)
        if self.strength is not None and not (isinstance(self.strength, int | float) and 0 < self.strength <= 1):
            raise ValueError(f"stages: strength={self.strength!r} must be above 0 up to 1")


@dataclass(frozen=True)
class Staging:
    """How stages are planned and refined.

    Args:
        factor: largest enlargement per stage and side, above 1 up to 4.
        strength: of every stage but the first, above 0 up to 1.
        pull: toward the low frequencies of the smaller image; None: no pull.
        upscale: how an image is enlarged between stages: ``"bicubic"``, a function of the image ``[B, 3, h, w]`` in
            0..1 and the new (height, width), or ``"latent"``: bicubic on latents, without decoding between stages
            (Stable Diffusion, SDXL, SD3, FLUX). An image of the caller is always enlarged as pixels.
        match: give each refined image the lowest frequencies of the first one (``match_colour``); not for latents.
        sizes: the stages themselves; the last one has the size of the call.

    Raises:
        ValueError: names the argument, its value and what is valid.
    """

    factor: float = 2.0
    strength: float = 0.6
    pull: Pull | None = field(default_factory=Pull)
    upscale: Literal["bicubic", "latent"] | Upscaler = "bicubic"
    match: bool = True
    sizes: tuple[Stage, ...] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.factor, int | float) and 1 < self.factor <= 4):
            raise ValueError(f"stages: factor={self.factor!r} must be above 1 and at most 4")
        Stage(1, 1, self.strength)  # checks the strength
        if self.upscale not in ("bicubic", "latent") and not callable(self.upscale):
            raise ValueError(f"stages: upscale={self.upscale!r} must be 'bicubic', 'latent' or a function")
        validate.flag("stages: match", self.match)
        if not all(isinstance(stage, Stage) for stage in self.sizes or ()):
            raise ValueError(f"stages: sizes={self.sizes!r} must be Stages")


Stages = Literal["auto"] | Staging | Sequence[Stage] | None
"""What ``stages=`` takes: planned with defaults, planned as given, a list of stages, or no stages."""


def staging(stages: Stages) -> Staging | None:
    """``stages=`` as a :class:`Staging`.

    Raises:
        TypeError: it is not of :data:`Stages`.
        ValueError: it is an empty list.
    """
    if stages is None or isinstance(stages, Staging):
        return stages
    if isinstance(stages, str) and stages == "auto":
        return Staging()
    if isinstance(stages, list | tuple) and all(isinstance(stage, Stage) for stage in stages):
        if not stages:
            raise ValueError("stages=[]: give at least one Stage, or None")
        return Staging(sizes=tuple(stages))
    raise TypeError(f"stages={stages!r}: must be None, 'auto', a Staging or a list of Stage")


def plan_stages(size: Pair, native: Pair, multiple: int, config: Staging, start: Pair | None = None) -> list[Stage]:
    """The stages from the ``native`` size, or from an image of size ``start``, to ``size``, all (height, width) in px.

    The first stage has the native area and the aspect ratio of ``size``, but no side below half of the native one.
    The others all enlarge by one ratio, and there are as few as ``config.factor`` allows. Every side is a multiple of
    ``multiple``.

    Raises:
        ValueError: ``size`` is not a multiple, or the given stages do not lead to it.
    """
    height, width = size
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(f"size {width}x{height}: each side must be a multiple of {multiple} px")
    if config.sizes is not None:
        return _check_given(config.sizes, size, multiple, start)
    begin, stages = start, []
    if begin is None:
        area = math.sqrt(native[0] * native[1] / (height * width))
        scale = min(1.0, max(area, min(native) / 2 / min(size)))
        begin = (_rounded(scale * height, multiple), _rounded(scale * width, multiple))
    total = max(height / begin[0], width / begin[1])
    # The 0.02: rounding of the native size must not cost one more stage.
    count = max(0, math.ceil(math.log(total) / math.log(config.factor) - 0.02)) if total > 1 else 0
    if start is None:
        first = begin if count else size  # equal to the native size up to rounding
        stages.append(Stage(first[1], first[0], None))
    else:
        count = max(1, count)
    for index in range(1, count):
        # Each axis has its own ratio, because a given image may have another aspect ratio than the result.
        h, w = (
            _rounded(first * (last / first) ** (index / count), multiple)
            for first, last in zip(begin, size, strict=True)
        )
        stages.append(Stage(w, h, config.strength))
    return [*stages, Stage(width, height, config.strength)] if count else stages


def _rounded(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


def _check_given(stages: Sequence[Stage], size: Pair, multiple: int, start: Pair | None) -> list[Stage]:
    last = stages[-1]
    if (last.height, last.width) != size:
        raise ValueError(
            f"stages: the last one is {last.width}x{last.height} px, but the call's size is {size[1]}x{size[0]}"
        )
    for index, stage in enumerate(stages):
        name = f"stage {index + 1} of {stage.width}x{stage.height} px"
        generates = index == 0 and start is None
        if generates and stage.strength is not None:
            raise ValueError(f"{name}: strength={stage.strength} needs a picture; the first stage takes None")
        if not generates and stage.strength is None:
            raise ValueError(f"{name}: needs a strength; only a first stage without an image takes None")
        if stage.width % multiple or stage.height % multiple:
            raise ValueError(f"{name}: each side must be a multiple of {multiple} px")
        if index and (stage.width < stages[index - 1].width or stage.height < stages[index - 1].height):
            raise ValueError(f"{name}: is smaller than the stage before it")
    return list(stages)
