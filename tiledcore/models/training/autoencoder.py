"""Train the autoencoder: first to reconstruct, then the decoder alone to look sharp; resumes from its last save.

``python -P -m tiledcore.models.training.autoencoder --minutes 20 30``. In stage 1 the loss is L1 on the image and its
gradients. Training starts from a teacher (by default the embedded autoencoder). The first latent channels stay near the
teacher's, so that denoisers that know these can go on; channels that the teacher lacks hold what it loses. In stage 2
the encoder is frozen and the decoder learns against a small patch discriminator (Isola et al. 2017) with a hinge loss.
The decoder sees slightly noised latents throughout, so that small errors of a denoiser do not turn into crackle.
"""

from __future__ import annotations

import argparse
import copy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from . import architecture, data, metrics
from .common import MODELS, WORK, Schedule, prefetch, save_state, to_float, update_ema


def detail_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """L1 on the image and on its finite differences at three scales: edges count as much as tones."""
    loss = (x - y).abs().mean()
    for _ in range(3):
        loss = loss + ((x - y).diff(dim=-1).abs().mean() + (x - y).diff(dim=-2).abs().mean()) / 2
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return loss


def discriminator() -> nn.Sequential:
    """Says of each patch of 22 px, one for every 4x4 px, how real it looks."""
    return nn.Sequential(
        nn.Conv2d(3, 48, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(48, 96, 4, 2, 1),
        nn.GroupNorm(8, 96),
        nn.LeakyReLU(0.2),
        nn.Conv2d(96, 128, 3, 1, 1),
        nn.GroupNorm(8, 128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 1, 3, 1, 1),
    )


def noised(z: torch.Tensor, most: float) -> torch.Tensor:
    """Add noise of a random strength for each image, up to ``most`` (the latents have about unit variance)."""
    return z + most * torch.rand(len(z), 1, 1, 1) ** 2 * torch.randn_like(z)


@torch.no_grad()
def start_from(vae: Any, teacher: Any) -> None:
    """Take the weights of ``teacher``, an autoencoder of the same shape with as many or fewer latent channels.

    The images and the first latent channels are those of the teacher: weights from a new channel to them start at zero.
    """
    old, new = teacher.config.latent_channels, vae.config.latent_channels
    latents = torch.arange(old)
    moments = torch.cat([latents, new + latents])  # means and log-variances
    theirs = teacher.state_dict()
    for name, weights in vae.state_dict().items():
        places = [
            torch.arange(m) if n == m else moments if n == 2 * old else latents
            for n, m in zip(theirs[name].shape, weights.shape, strict=True)
        ]
        weights[places[0]] = 0
        weights[torch.meshgrid(*places, indexing="ij")] = theirs[name]


class Trainer:
    """Autoencoder, averaged weights, discriminator, and how they are saved and found again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.work / "vae.pt"
        self.vae: Any = architecture.build_vae()
        self.judge: Any = discriminator()
        self.teacher: Any = AutoencoderKL.from_pretrained(args.teacher, torch_dtype=torch.float32)
        self.teacher.eval().requires_grad_(False)
        self.step, self.stage, self.used = 0, 0, 0.0
        state: dict[str, Any] = torch.load(self.path) if self.path.exists() else {}
        if state:
            self.vae.load_state_dict(state["model"])
            self.judge.load_state_dict(state["judge"])
            self.step, self.stage, self.used = state["step"], state["stage"], state["used"]
        else:
            start_from(self.vae, self.teacher)
        modules: tuple[Any, ...] = (self.vae, self.judge, self.teacher)
        self.vae, self.judge, self.teacher = (m.to(memory_format=torch.channels_last) for m in modules)
        self.ema = copy.deepcopy(self.vae).requires_grad_(False)
        if state:
            self.ema.load_state_dict(state["ema"])
        self.optimizers(state)

    def optimizers(self, state: dict[str, Any]) -> None:
        """AdamW as each stage needs it, with its moments where they were saved."""
        if self.stage == 0:
            self.adam = torch.optim.AdamW(self.vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
        else:
            self.vae.requires_grad_(False)
            parts = (self.vae.decoder, self.vae.post_quant_conv)
            own = [p.requires_grad_(True) for part in parts for p in part.parameters()]
            self.adam = torch.optim.AdamW(own, lr=3e-4, betas=(0.5, 0.9), weight_decay=1e-4)
        self.judge_adam = torch.optim.AdamW(self.judge.parameters(), lr=4e-4, betas=(0.5, 0.9))
        if state.get("adam"):
            self.adam.load_state_dict(state["adam"])
            self.judge_adam.load_state_dict(state["judge_adam"])
        self.rates = [
            (group, group["initial_lr"] if "initial_lr" in group else group["lr"])
            for group in (*self.adam.param_groups, *self.judge_adam.param_groups)
        ]
        for group, lr in self.rates:
            group["initial_lr"] = lr

    def save(self) -> None:
        state = {"model": self.vae.state_dict(), "ema": self.ema.state_dict(), "judge": self.judge.state_dict()}
        state |= {"adam": self.adam.state_dict(), "judge_adam": self.judge_adam.state_dict()}
        save_state(self.path, state | {"step": self.step, "stage": self.stage, "used": self.used})

    @torch.no_grad()
    def freeze_encoder(self) -> None:
        """Between the stages: go on from the averaged weights. The latents keep the teacher's scale."""
        self.vae.load_state_dict(self.ema.state_dict())
        self.optimizers({})
        self.vae.save_pretrained(self.args.work / "encoder")

    def reconstruct(self, x: torch.Tensor, progress: float) -> dict[str, torch.Tensor]:
        """Losses of stage 1."""
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = self.teacher.encode(x).latent_dist.mean.float()
            z = self.vae.encode(x).latent_dist.mean.float()
            y = self.vae.decode(noised(z, 0.15)).sample
        known, more = z.tensor_split([target.shape[1]], 1)
        distance = F.mse_loss(known, target)
        spread = more.std((0, 2, 3)).sub(1).square().sum() + more.mean((0, 2, 3)).square().sum()
        weight = 0.5 * (1 - progress) + 0.05
        return {
            "detail": detail_loss(y.float(), x),
            "teacher": distance * weight,
            "unit": 0.1 * spread,
            "gap": distance.detach(),
        }

    def sharpen(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of the decoder in stage 2; the discriminator makes its own step."""
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = self.vae.encode(x).latent_dist.mean.float()
            y = self.vae.decode(noised(z, 0.3)).sample
            self.judge.requires_grad_(True)
            real, fake = self.judge(x), self.judge(y.detach())
            hinge = (F.relu(1 - real) + F.relu(1 + fake)).float().mean()
        self.judge_adam.zero_grad(set_to_none=True)
        hinge.backward()
        self.judge_adam.step()
        self.judge.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            wish = -self.judge(y).float().mean()
        strength = self.args.adversary * min(1.0, self.step / 200)
        return {"detail": detail_loss(y.float(), x), "fooling": wish * strength, "hinge": hinge.detach()}

    def train_on(self, x: torch.Tensor, factor: float, progress: float) -> dict[str, float]:
        for group, lr in self.rates:
            group["lr"] = lr * factor
        losses = self.reconstruct(x, progress) if self.stage == 0 else self.sharpen(x)
        self.adam.zero_grad(set_to_none=True)
        total: Any = sum(loss for loss in losses.values() if loss.requires_grad)
        total.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.vae.parameters() if p.requires_grad], 1.0)
        self.adam.step()
        self.step += 1
        update_ema(self.ema, self.vae, self.step, 0.99 if self.stage == 0 else 0.995)
        return {name: float(loss.detach()) for name, loss in losses.items()}


def windows(rasters: data.Rasters, rng: np.random.Generator, size: int, count: int) -> torch.Tensor:
    """``count`` random windows of ``size`` px, ``float32 [N,3,size,size]``."""
    return to_float(np.stack([data.random_crop(rasters, size, rng).image for _ in range(count)]))


@torch.no_grad()
def figures(vae: Any, x: torch.Tensor) -> str:
    """Fidelity and spectrum distance on held-out crops."""
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(4)])
    real, made = ((t.float().clamp(-1, 1).movedim(1, -1).numpy() + 1) / 2 for t in (x, y))
    return f"psnr {metrics.psnr(made, real):.2f} dB spectrum {metrics.spectrum_distance(made, real):.3f}"


def run_stage(trainer: Trainer, batches: list[Iterator[torch.Tensor]], held: torch.Tensor, stop: list[int]) -> None:
    schedule = Schedule(trainer.args.minutes[trainer.stage], trainer.used, warmup=30, fall=0.6)
    log: list[dict[str, float]] = []

    def report() -> None:
        means = " ".join(f"{k} {np.mean([entry[k] for entry in log]):.4f}" for k in log[0]) if log else ""
        print(
            f"stage {trainer.stage + 1} step {trainer.step} min {trainer.used / 60:.1f} {means} "
            f"{figures(trainer.ema, held)}",
            flush=True,
        )
        log.clear()

    report()
    while not schedule.done and not stop:
        factor = schedule.tick()
        large = schedule.progress > 0.75
        log.append(trainer.train_on(next(batches[large]), factor, schedule.progress))
        trainer.used = schedule.used
        if trainer.step % 100 == 0:
            report()
            trainer.save()
    report()
    trainer.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--teacher", type=Path, default=MODELS / "earth" / "vae", help="diffusers folder")
    parser.add_argument("--minutes", type=float, nargs=2, default=(20, 30), help="of the two stages")
    parser.add_argument("--adversary", type=float, default=0.03, help="weight of the discriminator's loss")
    parser.add_argument(
        "--batch", type=int, default=4, help="windows of 128 px; a quarter as many of 256 px at the end"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer, rasters = Trainer(args), data.load_rasters()
    torch.manual_seed(args.seed + trainer.step)
    held_rng = np.random.default_rng(0)
    held = to_float(np.stack([data.random_crop(rasters, 256, held_rng, held_out=True).image for _ in range(24)]))
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))

    def stream(size: int, count: int) -> Iterator[torch.Tensor]:
        rng = np.random.default_rng(args.seed + 7 * trainer.step + size)
        return prefetch(lambda: windows(rasters, rng, size, count).contiguous(memory_format=torch.channels_last))

    batches = [stream(128, args.batch), stream(256, max(1, args.batch // 4))]
    while trainer.stage < 2 and not stop:
        run_stage(trainer, batches, held, stop)
        if stop:
            break
        trainer.stage, trainer.step, trainer.used = trainer.stage + 1, 0, 0.0
        if trainer.stage == 1:
            trainer.freeze_encoder()
        trainer.save()


if __name__ == "__main__":
    main()
