"""A prompt for each tile: every tile is evaluated with its own text, and predictions blend as ever."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tiledcore.compose.regional import Regional
from tiledcore.geometry import Pair
from tiledcore.hook import NetworkHook
from tiledcore.tiles.conditioning import TileBatch
from tiledcore.tiles.denoiser import Forward, Prediction, TileDenoiser

Box = tuple[int, int, int, int]
PromptForTile = Callable[[Box], str | None] | Sequence[str | None]
"""``(left, top, right, bottom)`` px -> the prompt of a tile, or all prompts row by row; None: the call's prompt."""
BATCH = 16  # Texts that are encoded together


class TilePrompts(Regional):
    """The prompts of the tiles of one call. Each distinct text is encoded once, before the first evaluation.

    ``texts``: a function of a tile's box, or a list with one prompt per tile where tiles do not move. On an axis that
    wraps, a box may end past the canvas.
    """

    def __init__(self, hook: NetworkHook, texts: PromptForTile) -> None:
        super().__init__(hook, ())
        config = hook.denoiser.config
        if config.mode != "tiles":
            raise ValueError(f"prompt_for_tile: not with mode={config.mode!r}; give mode='tiles' or regions=")
        if not callable(texts) and config.moving is not None:
            raise ValueError(
                "prompt_for_tile: a list has one prompt per tile, and these tiles move; give a function of a tile's "
                "box, or a tiling with motion='still'"
            )
        self._asked = texts
        self._known: dict[tuple[Pair, Pair], str | None] = {}  # (offset, tile) in canvas pixels
        self._rows: dict[str, list[Tensor]] = {}  # per text: one row of everything that encode_prompt gave

    def evaluate(
        self,
        denoiser: TileDenoiser,
        prompts: list[dict[str, Any]],
        forward: Forward,
        sample: Tensor,
        kwargs: dict[str, Any],
    ) -> Prediction:
        if not self._known:
            self._encode(denoiser, (sample.shape[2], sample.shape[3]))
        images = len(kwargs["encoder_hidden_states"])
        more = partial(self._changes, images, images - len(self._encoded[0][0]))
        kwargs = {**kwargs, "per_tile": [more, *kwargs.get("per_tile", ())]}  # a ControlNet gets the tile's text too
        return denoiser.evaluate(forward, sample, **kwargs)

    def _encode(self, denoiser: TileDenoiser, size: Pair) -> None:
        """Ask for the prompts of the tiles of all steps, and encode them."""
        times = (0.0,) if denoiser.timesteps is None else denoiser.timesteps()
        pixels = denoiser.pixels
        for tiling in [denoiser.tiling(*size, time) for time in times]:
            places = [(at, tile) for tile, group in tiling.groups.items() for at in group]
            if not callable(self._asked) and len(self._asked) != len(places):
                grid = f"{len(tiling.rows)} rows of {len(tiling.cols)}"
                raise ValueError(f"prompt_for_tile: {len(self._asked)} prompts for {len(places)} tiles, {grid}")
            for i, ((y, x), (h, w)) in enumerate(places):
                if ((y, x), (h, w)) not in self._known:
                    box = (x * pixels, y * pixels, (x + w) * pixels, (y + h) * pixels)
                    text = self._asked(box) if callable(self._asked) else self._asked[i]
                    if text is not None and not isinstance(text, str):
                        raise ValueError(f"prompt_for_tile: gave {text!r} for the tile {box} px, not a text or None")
                    self._known[(y, x), (h, w)] = text
        texts = sorted({text for text in self._known.values() if text is not None})
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            encoded = self.encode(some)
            for i, text in enumerate(some):
                full = encoded[0].new_ones(encoded[0].shape[1], dtype=torch.bool)  # in place of a mask that is None
                self._rows[text] = [full if value is None else value[i] for value in encoded]

    def _changes(self, images: int, kept: int, part: TileBatch, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a tile batch that depend on the prompt. The first ``kept`` images have a negative one."""
        texts = [self._known[(y, x), part.tile] for y, x in part.offsets.tolist()]
        wanted = list(product(range(images)[part.images], texts))

        def change(name: str, place: int, old: Tensor | None) -> Tensor | None:
            if old is None and name == "encoder_hidden_states_mask":
                old = torch.ones_like(given["encoder_hidden_states"][..., 0])
            if old is None:
                return None
            rows = [
                row if image < kept or text is None else self._rows[text][place].to(row)
                for row, (image, text) in zip(old, wanted, strict=True)
            ]
            return pad_sequence(rows, batch_first=True)  # of several lengths: the network takes a mask of them

        return self._changed(given, change)
