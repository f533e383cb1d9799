"""tile and sample: the engine for any function of a tile, without diffusers' pipelines."""

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tiledcore.config import Execution, TilingConfig
from tiledcore.loop.engine import Buffers
from tiledcore.schedulers.solver import NotLinearError, linear_solver
from tiledcore.tiles.denoiser import TileDenoiser


def tile(fn: Callable[..., Tensor], config: TilingConfig, execution: Execution | None = None) -> Callable[..., Tensor]:
    """Make a function of a tile one of a canvas of any size. It runs without gradients.

    Args:
        fn: ``fn(x [N, C, h, w], *args) -> [N, C', h, w]``, for any number N of tiles: a network, an ONNX session, ...
        config: how the canvas is cut; ``tile`` must be given, in pixels of ``x``. Moving tiles lie elsewhere for each
            value of the first of ``args``, a number such as a timestep.
        execution: ``tile_batch`` is the greatest N.

    Returns:
        ``tiled(x [B, C, H, W], *args) -> [B, C', H, W]``. Tensors ``[B or 1, C'', H, W]`` in ``args`` are cut with
        ``x``; other tensors with B rows are repeated for each tile; everything else is given as it is.

    Raises:
        ValueError: names the setting, its value and what is valid.
    """
    denoiser, forward = _denoiser(fn, config, execution)

    @torch.no_grad()
    def tiled(x: Tensor, *args: Any) -> Tensor:
        _check_canvas("x", x)
        time = args[0] if args and isinstance(args[0], Tensor | float | int) else None
        if config.moving is not None and (time is None or torch.as_tensor(time).numel() != 1):
            raise ValueError("motion: tiles move with the first argument after x, which must be one number")
        return denoiser(forward, x, 0 if time is None else time, args=args)

    return tiled


@torch.no_grad()
def sample(
    fn: Callable[..., Tensor],
    noise: Tensor,
    scheduler: Any,
    config: TilingConfig,
    *args: Any,
    execution: Execution | None = None,
    generator: Any = None,
) -> Tensor:
    """Denoise a canvas in tiles: each step is gather, ``fn`` on tile batches, and one fused blend and scheduler step.

    Args:
        fn: ``fn(x [N, C, h, w], timestep, *args) -> [N, C, h, w]``: the prediction that the scheduler expects, guided.
        noise: ``[B, C, H, W]``, standard normal; it is scaled to what the scheduler begins with.
        scheduler: of diffusers, after ``set_timesteps``. One that is not linear runs its own ``step``.
        config: as for :func:`tile`. Moving tiles blend the steps that ``motion`` says, and do not fade.
        args: further arguments of ``fn``, treated as by :func:`tile`.
        execution: how it is computed.
        generator: of the noise that some schedulers add in each step.

    Returns:
        ``[B, C, H, W]`` in the dtype of ``noise``.
    """
    denoiser, forward = _denoiser(fn, config, execution)
    _check_canvas("noise", noise)
    times: list[float] = torch.as_tensor(scheduler.timesteps).float().tolist()  # the device is asked once
    denoiser.timesteps = lambda: times
    latents = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    try:
        solver = linear_solver(scheduler).to(noise.device, torch.promote_types(noise.dtype, torch.float32))
    except NotLinearError:
        own = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
        for t, time in zip(scheduler.timesteps, times, strict=True):
            x = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
            predicted = denoiser(forward, x, t, time=time, args=(t, *args))
            latents = scheduler.step(predicted, t, latents, return_dict=False, **own)[0]
        return latents
    buffers = Buffers(solver, noise)
    buffers.state[0].copy_(latents)
    buffers.model_input.copy_(buffers.state[0] * buffers.input_scale[0])
    for t, time, draws in zip(solver.timesteps, times, solver.uses_noise, strict=True):
        if draws and buffers.noise is not None:
            buffers.noise.copy_(solver.noise(generator, buffers.model_input))
        denoiser.place((noise.shape[2], noise.shape[3]), time, noise.device)
        tiles = denoiser.attempt(forward, buffers.model_input, t, args=(t, *args))
        buffers.advance(tiles, window=config.window, impl=denoiser.execution.impl)
    return buffers.state[0].to(noise.dtype)


def _check_canvas(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.numel() or not x.is_floating_point():
        got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: must be a tensor [B, C, H, W] of floats, got {got}")


def _denoiser(
    fn: Callable[..., Tensor], config: TilingConfig, execution: Execution | None
) -> tuple[TileDenoiser, Callable[..., tuple[Tensor]]]:
    """The denoiser of a function, and the function as a denoiser calls it."""
    if not callable(fn) or not isinstance(config, TilingConfig):
        raise TypeError(f"fn={fn!r}, config={config!r}: must be a function and a TilingConfig")
    size = config.tile
    if config.mode != "tiles" or size is None:
        raise ValueError(f"config: mode={config.mode!r}, tile={config.tile}: a function needs mode='tiles' and a tile")
    if config.moving is not None:
        if config.moving.fade:
            raise ValueError(f"fade={config.moving.fade}: only a TiledPipeline fades; give fade=0")
        config = replace(config, motion=replace(config.moving, fade=0))

    def forward(tiles: Tensor, timestep: Any, args: tuple[Any, ...] = ()) -> tuple[Tensor]:
        out = fn(tiles, *args)
        if not isinstance(out, Tensor) or out.ndim != 4 or (len(out), *out.shape[2:]) != (len(tiles), *tiles.shape[2:]):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"fn: gave {got} for tiles of {tuple(tiles.shape)}: only the channels may differ")
        return (out,)

    return TileDenoiser(config, execution or Execution(), size, pixels=1), forward
