"""Predict the peak memory of making an image, by running the real code on fake tensors (without data).

The phases of a call are text encoders, network (in tiles or on the whole canvas), fused step and VAE.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tiledcore import ops
from tiledcore._diffusers import float32_parts
from tiledcore.canvas import attention
from tiledcore.config import Execution, TilingConfig
from tiledcore.feature import Step
from tiledcore.geometry import Pair, Partition, Tiling, both
from tiledcore.memory.architectures import Architecture, Part, tensor_bytes
from tiledcore.memory.simulation import Simulated, build, simulated
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.fade import Fade
from tiledcore.tiles.families import FAMILIES, Family
from tiledcore.vae.plan import choose

SLOTS = 2
"""Canvases of scheduler state: those of a second-order multistep scheduler."""
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    f"{letter}ib": 2 ** (10 * power) for power, letter in enumerate("kmgt", 1)
}


def parse_bytes(value: int | str) -> int:
    """Parse a number of bytes: 24_000_000_000, ``"24GiB"``, ``"24 GB"`` or ``"512MiB"``.

    Raises:
        ValueError: not a number of bytes, no unit, or not from 1 byte to 1024 TiB.
    """
    size = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?i?b)?\s*", value.lower())
        if match is not None and match[2] is None:
            raise ValueError(f"budget={value!r}: has no unit; write {match[1]}GiB, {match[1]}MiB or {match[1]}B")
        if match is not None:
            size = int(float(match[1]) * UNITS.get(match[2], 0))
    if not 1 <= size <= 2**50:
        raise ValueError(
            f"budget={str(value)[:40]!r}: must be a number of bytes from 1 to 1024TiB, such as '24GiB' or '24GB'"
        )
    return size


def show_bytes(size: float) -> str:
    """A size as text, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Phase:
    """One part of a call."""

    name: str
    peak: int
    """Predicted bytes on the device, weights included, without the safety factor."""
    flops: int
    """Of the network: per step."""
    choice: str
    """The choice that was made for it."""


@dataclass(frozen=True)
class Evaluation:
    """The network on one canvas and the step after it, in bytes without the network's weights."""

    network: int
    step: int
    kept: int
    """The engine's buffers, which still exist while the image is decoded."""
    flops: int
    tiles: int
    area_factor: float


@dataclass(frozen=True)
class Decode:
    """Decoding an image."""

    base: int
    """Bytes of weights, latents and the image."""
    peak: int
    flops: int
    band: int | None
    """Rows of the image at a time, px; None: all."""


class Predictor:
    """Predicts the phases of one model on ``"cuda"`` or ``"cpu"``; modules and results are cached."""

    def __init__(self, model: Architecture, device: str) -> None:
        self.model, self.device = model, device
        self.mode = FakeTensorMode()
        self.module = cache(self._module)
        self.evaluation = cache(self._evaluation)
        self.text = cache(self._text)
        self.decode = cache(self._decode)

    def _module(self, role: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
        part = self.part(role)
        return build(part.make, dtype or part.dtype, self.mode)

    @property
    def family(self) -> Family:
        return next(family for family in FAMILIES if family.model.__name__ == self.model.network.kind)

    @property
    def unit(self) -> int:
        """Both sides of an image must be multiples of this, px."""
        return self.model.factor * self.family.patch(self.module(self.model.network.role))

    def part(self, role: str) -> Part:
        return next(part for part in self.model.parts if part.role == role)

    def weights(self, role: str) -> int:
        """Bytes of a module's weights: of the real module if there is one."""
        part, module = self.part(role), self.module(role)
        if part.weight_bytes is not None:
            return part.weight_bytes
        # With float16, transformers keeps some of T5's layers in float32.
        kept = float32_parts(module) if part.dtype == torch.float16 else ()
        twice = sum(p.nbytes for name, p in module.named_parameters() if set(kept) & set(name.split(".")))
        return tensor_bytes(module) + twice

    def _text(self, images: int) -> dict[str, tuple[int, int]]:
        """Per text encoder: bytes without weights, and FLOPs, for one prompt per image."""
        found = {}
        for part in self.model.text_encoders:
            module = self.module(part.role)
            length = part.config.get("max_position_embeddings") or self.model.long_text
            with simulated(self.mode, [module], self.device) as run:
                module(torch.zeros(images, length, dtype=torch.int64), output_hidden_states=True)
            found[part.role] = (run.live.peak - tensor_bytes(module), run.flops)
        return found

    def _evaluation(
        self, canvas: Pair, config: TilingConfig, execution: Execution, images: int, branches: int
    ) -> Evaluation:
        """One step on a canvas of (height, width) latent pixels; for shifted grids the worst of three steps."""
        network: Any = self.module(self.model.network.role)
        family = self.family
        patch = family.patch(network)
        found = []
        for timestep in (999, 500, 1) if config.moving else (999,):
            denoiser = TileDenoiser(
                config, execution, self.model.native, self.model.factor, patch, family.unit(network)
            )
            if config.mode == "canvas":
                hook = attention.install(network, config, execution, both(self.model.native))
                # The hook normally reads these from the values of position arguments, which do not exist here.
                hook.grid = ((canvas[0] // patch, canvas[1] // patch), patch)
            try:
                with simulated(self.mode, [network], self.device) as run:
                    size = (canvas[0] // denoiser.unit, canvas[1] // denoiser.unit)
                    found.append(self._step(run, denoiser, family, network, size, images, branches, timestep))
            finally:
                attention.remove(network)
        return max(found, key=lambda evaluation: evaluation.network)

    def _step(
        self,
        run: Simulated,
        denoiser: TileDenoiser,
        family: Family,
        network: Any,
        size: Pair,
        images: int,
        branches: int,
        timestep: float,
    ) -> Evaluation:
        """The same work as :meth:`tiledcore.loop.engine.Engine.run_step`, on buffers of the same sizes."""
        weights, dtype = tensor_bytes(network), self.model.network.dtype
        channels = network.config.in_channels
        latents = torch.empty(images, channels, *size, dtype=dtype)
        held = [torch.cat([latents] * branches)]  # held by the pipeline in the first step
        conditions = _conditions(self.model, network, size, images * branches)
        state = torch.empty(SLOTS, *latents.shape, dtype=torch.float32)
        model_input = torch.empty_like(latents)
        predicted = channels if family.packed else network.config.out_channels

        def forward(tiles: Tensor, timestep: Any, **given: Any) -> tuple[Tensor]:
            inputs = {**given, family.timestep: timestep}
            inputs |= family.tiles(tiles, inputs, denoiser.pixels)
            return (family.prediction(network(return_dict=False, **inputs)[0], (tiles.shape[2], tiles.shape[3])),)

        denoiser.place(size, timestep, latents.device)
        tiling = denoiser.tiling(*size, timestep)
        sample = torch.cat([model_input] * branches)
        conditions["timestep"] = torch.zeros(() if family.sample == "sample" else len(sample), dtype=dtype)
        if denoiser.config.mode == "canvas" or len(tiling) == 1:
            tiles, offsets, _, ramp = denoiser.evaluate(forward, sample, **conditions)
            total = run.flops
        else:
            # As denoiser.evaluate, but one full batch and the rest of each size, because all batches need the same.
            total, (count, height, width) = 0, _buffer_size(tiling)
            tiles = denoiser._buffer((count * len(sample), predicted, height, width), latents)
            offsets, ramp = torch.zeros(count, 2, dtype=torch.int32), denoiser.ramp(tiling)
            for tile, places in tiling.groups.items():
                full, rest = divmod(len(places), denoiser.tile_batch)
                for number, times in ((denoiser.tile_batch, full), (rest, 1)):
                    if not number * times:
                        continue
                    before, part = run.flops, torch.zeros(number, 2, dtype=torch.int32)
                    out = latents.new_empty(number * len(sample), predicted, *tile)  # of the batch before
                    out = denoiser._tile_batch(forward, sample, part, tile, conditions)
                    total += (run.flops - before) * times
            del out
        peak = run.live.reset()
        del sample
        held.clear()
        fade, guided, motion = Fade(1.0, both(denoiser.config.wrap)), branches == 2, denoiser.config.moving
        if motion is not None and motion.fade != 0 and isinstance(denoiser.placed, Partition):
            fade.begin_at([(1.0, 0.0)] * 2)
            whole = (tiles if len(offsets) == 1 else ops.blend_tiles(tiles, offsets, size)).to(state.dtype)
            if guided:
                unconditional, conditional = whole.chunk(2)
                whole = unconditional + 2.0 * (conditional - unconditional)
            faded = fade.after_prediction(Step(1, state[0], denoiser.placed), whole)
            tiles, offsets, _, ramp = denoiser.whole(faded.to(dtype))
            guided = False
        ops.fused_step(
            tiles.contiguous(),
            offsets,
            state,
            torch.empty(1, SLOTS, SLOTS + 2),
            torch.empty(2),
            torch.zeros(1, dtype=torch.int64),
            model_input=model_input,
            guidance_scale=torch.ones(1) if guided else None,
            window=denoiser.config.window,
            ramp=ramp,
        )
        buffer = denoiser._tiles
        kept = (
            state.nbytes
            + model_input.nbytes
            + sum(t.nbytes for t in (buffer, *fade.tensors().values()) if t is not None)
        )
        one = denoiser.config.mode == "canvas"
        return Evaluation(
            network=peak - weights,
            step=run.live.reset() - weights,
            kept=kept,
            flops=total,
            tiles=1 if one else len(tiling),
            area_factor=1.0 if one else tiling.area_factor,
        )

    def _decode(self, canvas: Pair, images: int, room: int | None) -> Decode:
        """Decode latents of (height, width) to an image; weights of the VAE included.

        ``room``: bytes for bands, without weights, latents and image; None decodes the whole image at once.
        """
        part = self.model.vae
        upcast = self.model.upcasts_vae and part.dtype == torch.float16
        vae: Any = self.module("vae", torch.float32 if upcast else None)
        shape = (images, vae.config.latent_channels, *canvas)
        real = part.weight_bytes
        extra = 0 if real is None else real * (2 if upcast else 1) - tensor_bytes(vae)
        with simulated(self.mode, [vae], self.device) as run:
            latents = [torch.empty(shape, dtype=vae.dtype) for _ in range(2)]  # scaled and not
            image = vae.decode(latents[0], return_dict=False)[0]
            base = tensor_bytes(vae) + extra + 2 * latents[0].nbytes + image.nbytes
            whole, flops = run.live.reset() + extra, run.flops
            torch.stack([(one * 0.5 + 0.5).clamp(0, 1) for one in image])  # VaeImageProcessor.denormalize
            after = run.live.peak + extra
        if room is None:
            return Decode(base, max(whole, after), flops, None)
        bands = choose(vae.decoder, shape, vae.dtype, room)
        return Decode(base, max(base + bands.peak_bytes, after), int(flops * bands.recomputed), bands.band_px)


def _buffer_size(tiling: Tiling | Partition) -> tuple[int, int, int]:
    """Tiles, height and width of the buffer for predictions; one canvas if tiles have several sizes."""
    if isinstance(tiling, Tiling):
        return len(tiling), *tiling.tile_size
    if len(tiling.groups) == 1:
        return len(tiling), *next(iter(tiling.groups))
    return 1, tiling.height, tiling.width


def _conditions(model: Architecture, network: Any, size: Pair, batch: int) -> dict[str, Any]:
    """The other arguments of the network's forward, as its pipeline passes them."""
    config, kind, dtype = network.config, model.network.kind, model.network.dtype

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    if kind == "UNet2DConditionModel":
        width = config.cross_attention_dim
        found: dict[str, Any] = {"encoder_hidden_states": empty(batch, model.text_tokens, width)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            found["added_cond_kwargs"] = {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, 6)}
        return found
    found = {
        "encoder_hidden_states": empty(batch, model.text_tokens, config.joint_attention_dim),
        "pooled_projections": empty(batch, config.pooled_projection_dim),
    }
    if kind == "FluxTransformer2DModel":
        found |= {"img_ids": empty(size[0] * size[1], 3), "txt_ids": empty(model.text_tokens, 3)}
        found["guidance"] = empty(batch) if config.guidance_embeds else None
    return found
