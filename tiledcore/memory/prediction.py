"""Predict the peak memory of making an image, by running the real code on fake tensors (shape and dtype, no data).

The phases of a call are text encoders, network (in tiles or on the whole canvas, with the fused step) and VAE. The
modules' real Python code runs, so the same tensors are alive at the same time as in a real run. Differences:

- Plain attention counts as a memory-efficient kernel: queries, keys, values and output, without the scores.
- ``neighbor_attention`` counts by its implementation: the kernels need no scratch, the others gather in chunks.
- Workspaces inside other kernels (cuDNN, cuBLAS, oneDNN) do not count; the planner's safety factor covers them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from tiledcore import ops
from tiledcore._diffusers import float32_parts
from tiledcore.canvas import attention
from tiledcore.config import Execution, TilingConfig
from tiledcore.feature import Features
from tiledcore.geometry import Pair, TileGrid, both
from tiledcore.loop.engine import Buffers, Engine
from tiledcore.loop.graph import StepGraphs
from tiledcore.memory.architectures import Architecture, tensor_bytes
from tiledcore.ops.neighbor_attention import CHUNK_BYTES, FASTEST, IMPLS
from tiledcore.schedulers.solver import LinearSolver
from tiledcore.tiles.denoiser import TileDenoiser
from tiledcore.tiles.fade import Fade
from tiledcore.tiles.families import FAMILIES
from tiledcore.vae.exact import choose
from tiledcore.vae.live_bytes import LiveBytes

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
    text = f"{value}B" if type(value) is int else str(value)
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?i?b)?\s*", text.lower())
    if match is not None and match[2] is None:
        raise ValueError(f"budget={value!r}: has no unit; write {match[1]}GiB, {match[1]}MiB or {match[1]}B")
    size = 0 if match is None else int(float(match[1]) * UNITS.get(match[2], 0))
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
    peak: int  # predicted bytes on the device, weights included, without the safety factor
    flops: int  # of the network: per step
    choice: str  # that was made for it


@dataclass(frozen=True)
class Evaluation:
    """The network on one canvas and the step after it, in bytes without the network's weights."""

    peak: int
    kept: int  # the engine's buffers, which still exist while the image is decoded
    flops: int
    tiles: int
    area_factor: float


@dataclass(frozen=True)
class Decode:
    """Decoding an image."""

    base: int  # bytes of weights, latents and the image
    peak: int
    flops: int
    band: int | None  # rows of the image at a time, px; None: all


@dataclass
class Simulated:
    """What was counted while modules ran on fake tensors."""

    live: LiveBytes
    counter: FlopCounterMode
    repeated: int = 0  # FLOPs of calls that :meth:`once` did not run again

    @property
    def flops(self) -> int:
        return int(self.counter.get_total_flops()) + self.repeated

    def once(self, forward: Callable[..., tuple[Tensor]]) -> Callable[..., tuple[Tensor]]:
        """Run a network once for each shape of its first argument; later calls count what that one needed."""
        known: dict[torch.Size, tuple[torch.Size, int, int]] = {}

        def call(given: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            live, before = self.live, self.live.now
            if given.shape in known:
                shape, flops, more = known[given.shape]
                self.repeated += flops
                live.peak = max(live.peak, before + more)
                return (given.new_empty(shape),)
            flops, earlier = self.flops, live.reset()
            result = forward(given, *args, **kwargs)
            known[given.shape] = (result[0].shape, self.flops - flops, live.peak - before)
            live.peak = max(live.peak, earlier)
            return result

        return call


def build(make: Callable[[], torch.nn.Module], dtype: torch.dtype, mode: FakeTensorMode) -> torch.nn.Module:
    """Build a module with fake weights of a floating dtype, without data, in about a second."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with mode:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def simulated(mode: FakeTensorMode, modules: Sequence[torch.nn.Module], device: str) -> Iterator[Simulated]:
    """Run the ``with`` block on fake tensors and count, as on ``device``; the fake tensors are on the CPU.

    ``modules``, which were built in ``mode``, count from the beginning.
    """
    kernel: ops.Impl = "triton" if device == "cuda" else "native"
    lacks = ops.unavailable("neighbor_attention", kernel, torch.device(device)) is not None
    gathers, most = lacks or (device == "cuda" and FASTEST), 2 * CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"])

    def scratch(func: Any, args: tuple[Any, ...]) -> int:
        attends = func.namespace == "tiledcore" and func._opname.startswith("neighbor_attention")
        return min(most, _gathered(*args)) if gathers and attends else 0

    live = LiveBytes(modules, scratch)
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with torch.no_grad(), mode, counter, live:
        yield Simulated(live, counter)


def _seen(size: int, tile: int, halo: int, wraps: bool) -> list[Pair]:
    """Per tile of one axis: (number of its queries, number of keys that they see)."""
    found = []
    for start in range(0, size, tile):
        end = min(start + tile, size)
        keys = end - start + 2 * halo if wraps else min(end + halo, size) - max(start - halo, 0)
        found.append((end - start, min(keys, size)))
    return found


def _gathered(q: Tensor, *arguments: Any) -> int:
    """Bytes of all queries, windows and results of ``neighbor_attention``, if ``"sdpa"`` gathered all at once."""
    axes = zip(*arguments[5:9], strict=True)
    keys = math.prod(sum(seen for _, seen in _seen(*axis)) for axis in axes)
    return int(q[:, :1].nbytes * 2 * (math.prod(arguments[5]) + keys))


def attention_pairs(canvas: Pair, tile: Pair, halo: Pair, wrap: tuple[bool, bool]) -> int:
    """The number of (query, key) pairs in neighbour attention, without global tokens."""
    axes = zip(canvas, tile, halo, wrap, strict=True)
    return math.prod(sum(queries * seen for queries, seen in _seen(*axis)) for axis in axes)


def _neighbor_attention_flops(q: Sequence[int], *arguments: Any, **_: Any) -> int:
    """FLOPs of two products (scores, and scores times values); a multiply-add counts as two."""
    batch, tokens, heads, dim = q
    pairs = attention_pairs(*arguments[5:9]) + tokens * (arguments[3][1] if arguments[3] else 0)
    return 4 * batch * heads * dim * pairs


register_flop_formula([getattr(torch.ops.tiledcore, f"neighbor_attention_{impl}") for impl in IMPLS])(
    _neighbor_attention_flops
)
# torch has formulas only for its CUDA kernels.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


class Predictor:
    """Predicts the phases of one model on ``"cuda"`` or ``"cpu"``; modules and results are cached."""

    def __init__(self, model: Architecture, device: str) -> None:
        self.model, self.device = model, device
        self.mode = FakeTensorMode()
        self.parts = {part.role: part for part in model.parts}
        self.family = next(family for family in FAMILIES if family.model.__name__ == model.network.kind)
        self.module = cache(self._module)
        self.evaluation = cache(self._evaluation)
        self.text = cache(self._text)
        self.decode = cache(self._decode)

    def _module(self, role: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
        part = self.parts[role]
        return build(part.make, dtype or part.dtype, self.mode)

    @property
    def unit(self) -> int:
        """Both sides of an image must be multiples of this, px."""
        return self.model.factor * self.family.patch(self.module(self.model.network.role))

    def weights(self, role: str) -> int:
        """Bytes of a module's weights: of the real module if there is one."""
        part, module = self.parts[role], self.module(role)
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
        """One step on a canvas of (height, width) latent pixels; for moving tiles the worst of three steps."""
        model, family = self.model, self.family
        network: Any = self.module(model.network.role)
        patch, unit, hook = family.patch(network), family.unit(network), None
        if config.mode == "canvas":
            hook = attention.install(network, config, execution, both(model.native))
            # Its layers normally read these from the values of position arguments, which do not exist here.
            hook.grid = ((canvas[0] // patch, canvas[1] // patch), patch)

        def forward(tiles: Tensor, timestep: Any, **given: Any) -> tuple[Tensor]:
            inputs = {**given, family.timestep: timestep}
            inputs |= family.tiles(tiles, inputs, model.factor * unit)
            return (family.prediction(network(return_dict=False, **inputs)[0], (tiles.shape[2], tiles.shape[3])),)

        try:
            with simulated(self.mode, [network], self.device) as run:
                once, found = run.once(forward), []
                for timestep in (999, 500, 1) if config.moving else (999,):
                    denoiser = TileDenoiser(config, execution, model.native, model.factor, patch, unit)
                    denoiser.attention = hook
                    size = (canvas[0] // unit, canvas[1] // unit)
                    found.append(self._step(run, denoiser, once, size, images, branches, timestep))
        finally:
            attention.remove(network)
        return max(found, key=lambda evaluation: evaluation.peak)

    def _step(
        self, run: Simulated, denoiser: TileDenoiser, forward: Any, size: Pair, images: int, branches: int, time: float
    ) -> Evaluation:
        """One step of the engine on a canvas of ``size`` canvas pixels, called as from a pipeline."""
        dtype, weights, flops = self.model.network.dtype, run.live.now, run.flops
        network: Any = self.module(self.model.network.role)
        run.live.reset()
        denoiser.place(size, time, torch.device("cpu"))
        tiling, motion = denoiser.tiling(*size, time), denoiser.config.moving
        fade = Fade(1.0, both(denoiser.config.wrap))
        if motion is not None and motion.fade != 0 and not isinstance(tiling, TileGrid):
            fade.coefficients = [(1.0, 0.0)] * 2
        latents = torch.empty(images, network.config.in_channels, *size, dtype=dtype)
        conditions = _conditions(self.model, network, size, images * branches)
        parts = {self.model.network.role: network, "scheduler": None, "vae_scale_factor": self.model.factor}
        engine = Engine(SimpleNamespace(**parts), {}, {}, StepGraphs(False), Features([fade]))
        solver = LinearSolver(SLOTS, torch.empty(1, SLOTS, SLOTS + 2), torch.empty(2), torch.empty(1), (False,))
        engine.branches, engine.buffers = branches, Buffers(solver, latents)
        timestep = torch.zeros(() if self.family.sample == "sample" else images * branches, dtype=dtype)
        held = torch.cat([latents] * branches)  # by the pipeline
        engine._step(denoiser, forward, timestep, conditions, index=1)
        peak = run.live.peak - weights
        del latents, conditions, timestep, held
        tiles, area_factor = (1, 1.0) if denoiser.config.mode == "canvas" else (len(tiling), tiling.area_factor)
        return Evaluation(peak, run.live.now - weights, run.flops - flops, tiles, area_factor)

    def _decode(self, canvas: Pair, images: int, room: int | None) -> Decode:
        """Decode latents of (height, width) to an image; weights of the VAE included.

        ``room``: bytes for bands, without weights, latents and image; None decodes the whole image at once.
        """
        part = self.model.vae
        upcast = self.model.upcasts_vae and part.dtype == torch.float16
        vae: Any = self.module("vae", torch.float32 if upcast else None)
        shape = (images, vae.config.latent_channels, *canvas)
        extra = 0 if part.weight_bytes is None else part.weight_bytes * (1 + upcast) - tensor_bytes(vae)
        with simulated(self.mode, [vae], self.device) as run:
            latents = [torch.empty(shape, dtype=vae.dtype) for _ in range(2)]  # scaled and not
            image = vae.decode(latents[0], return_dict=False)[0]
            base = tensor_bytes(vae) + extra + 2 * latents[0].nbytes + image.nbytes
            whole, flops = run.live.reset() + extra, run.flops
            torch.stack([(one * 0.5 + 0.5).clamp(0, 1) for one in image])  # VaeImageProcessor.denormalize
            after = run.live.peak + extra
        if room is None:
            return Decode(base, max(whole, after), flops, None)
        bands = choose(vae.decoder, shape, room)
        return Decode(base, max(base + bands.peak_bytes, after), int(flops * bands.recomputed), bands.band_px)


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
