"""Which stages lead to a size: integers and floats only, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tiledcore.geometry import Pair
from tiledcore.schedulers.pull import Pull

Upscaler = Callable[[Tensor, Pair], Tensor]
"""``([B, 3, h, w] in 0..1, (H, W))`` -> ``[B, 3, H, W]`` in 0..1."""


@dataclass(frozen=True)
class Stage:
    """One stage of a plan. Sizes are image pixels.

    Args:
        width: of the picture that the stage makes.
        height: the same.
        strength: share of the steps that are run on the enlarged picture, above 0 up to 1; None generates from
            nothing, in the first stage only.
    """

    width: int
    height: int
    strength: float | None

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 1:
            raise ValueError(f"stage of {self.width}x{self.height} px: both sides must be at least 1")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(
                f"stage of {self.width}x{self.height} px: strength={self.strength!r} must be above 0 up to 1"
            )


@dataclass(frozen=True)
class Staging:
    """How stages are laid out and refined.

    Args:
        factor: largest enlargement of one stage along a side, above 1 up to 4.
        strength: of every stage but the first, above 0 up to 1.
        pull: toward the coarse picture's low frequencies; None leaves it out.
        upscale: of the picture between two stages: ``"bicubic"``, or a function of the picture ``[B, 3, h, w]`` in
            0..1 and the new (height, width); or ``"latent"``, bicubic too, but of the latents, which are not decoded
            and encoded between stages (Stable Diffusion, SDXL, SD3, FLUX). A picture that the caller brings is
            enlarged as pixels.
        match: give each refined picture the lowest frequencies of the first one, so that what the pull lets go does
            not add up (``match_colour``); not where there are latents in place of pictures.
        sizes: the stages themselves, instead of planned ones; the last one's size is that of the call.

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
        if not 1 < self.factor <= 4:
            raise ValueError(f"stages: factor={self.factor!r} must be above 1 and at most 4")
        if not 0 < self.strength <= 1:
            raise ValueError(f"stages: strength={self.strength!r} must be above 0 up to 1")
        if self.upscale not in ("bicubic", "latent") and not callable(self.upscale):
            raise ValueError(f"stages: upscale={self.upscale!r} must be 'bicubic', 'latent' or a function")


Stages = Literal["auto"] | Staging | Sequence[Stage] | None
"""What ``stages=`` takes: planned by the defaults, planned otherwise, given one by one, or none."""


def staging(stages: Stages) -> Staging | None:
    """``stages=`` as a :class:`Staging`.

    Raises:
        TypeError: it is none of the forms of :data:`Stages`.
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
    """The stages from the native size, or from a picture, to ``size``; all (height, width) in image pixels.

    The first stage has the native area and the aspect ratio of ``size``, but no side below half of the native one: a
    long panorama starts longer, in tiles. The others enlarge by one ratio each, as few as ``config.factor`` allows.

    Args:
        size: of the last stage.
        native: at which the model was trained.
        multiple: that every side is a multiple of; ``size`` must be.
        config: factor, strength, or the stages themselves.
        start: of the picture that the first stage enlarges; then no stage generates from nothing.

    Raises:
        ValueError: ``size`` is no multiple, or the given stages do not lead to it.
    """
    height, width = size
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(f"size {width}x{height}: each side must be a multiple of {multiple} px")
    if config.sizes is not None:
        return _check_given(config.sizes, size, multiple, start)
    if start is None:
        area = math.sqrt(native[0] * native[1] / (height * width))
        scale = min(1.0, max(area, min(native) / 2 / min(size)))
        begin = (_rounded(scale * height, multiple), _rounded(scale * width, multiple))
    else:
        begin = start
    total = max(height / begin[0], width / begin[1])
    # A native size that is rounded must not cost a stage more.
    count = max(0, math.ceil(math.log(total) / math.log(config.factor) - 0.02)) if total > 1 else 0
    if start is not None:
        count = max(1, count)
    elif count == 0:
        begin = size  # it is the native size but for that rounding
    stages = [] if start is not None else [Stage(begin[1], begin[0], None)]
    for index in range(1, count + 1):
        # Each axis by its own ratio: a picture may have other proportions than the result.
        h, w = (
            _rounded(first * (last / first) ** (index / count), multiple)
            for first, last in zip(begin, size, strict=True)
        )
        stages.append(Stage(w, h, config.strength) if index < count else Stage(width, height, config.strength))
    return stages


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


def stage_steps(stage: Stage, steps: int, rounds_down: bool) -> int:
    """Steps of a stage, as diffusers' image-to-image pipelines count them; those of UNets round down."""
    if stage.strength is None:
        return steps
    return int(steps * stage.strength) if rounds_down else steps - int(max(steps - steps * stage.strength, 0))
