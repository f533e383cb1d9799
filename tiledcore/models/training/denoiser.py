"""Train a denoiser and its text encoders on cached latents; resumes from its last save.

``python -P -m tiledcore.models.training.denoiser --kind unet --minutes 120``. The first run starts from the exported
model, if there is one. Muon for matrices and kernels, AdamW for the rest, bfloat16 autocast, averaged weights, a
learning rate that falls over the second half of the minutes.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import architecture
from .common import MODELS, WORK, Schedule, prefetch, save_state, update_ema
from .latents import draw
from .muon import Muon, split
from .siblings import SIBLINGS

FOLDERS = {"unet": MODELS / "earth", "flux": MODELS / "earth_flux"}
LEVELS = (0.06, 0.18, 0.3, 0.42, 0.54, 0.66, 0.78, 0.9)


def held_out_loss(sibling: Any, model: torch.nn.ModuleDict, held: list[dict[str, Any]]) -> list[float]:
    """Loss of ``model`` on the held-out crops at fixed noise levels with fixed noise and captions."""
    own, sibling.model = sibling.model, model
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    rng, losses = np.random.default_rng(0), []
    latents, prompts = draw_held(held, rng)
    ids = sibling.tokenize(prompts)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = [float(sibling.loss(latents, ids, level)) for level in LEVELS]
    torch.random.set_rng_state(state)
    sibling.model = own
    return losses


def draw_held(held: list[dict[str, Any]], rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """The 32x32 held-out crops with one caption each."""
    from . import data

    fractions = [e["fractions"].double().mean((1, 2)).numpy() / 255 for e in held]
    prompts = [data.prompt(e["style"], f, e["scale"], rng) for e, f in zip(held, fractions, strict=True)]
    return torch.stack([e["latents"] for e in held]).float(), prompts


class Trainer:
    """Model, averaged weights and optimisers, and how they are saved and found again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.work / f"{args.kind}.pt"
        tokenizer = args.work / f"{args.kind}_tokenizer"
        if not tokenizer.exists():  # the two models' tokenizers number their words differently
            shutil.copytree(FOLDERS[args.kind] / "tokenizer", tokenizer)
        self.sibling = SIBLINGS[args.kind](args.work)
        self.model = self.sibling.model
        if not self.path.exists():
            self.sibling.start_from(FOLDERS[args.kind])
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        matrices, rest = split(self.model, self.sibling.network)
        self.muon = Muon(matrices, args.lr)
        self.adamw = torch.optim.AdamW(rest, lr=0.6 * args.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        self.step, self.windows, used = 0, 0, 0.0
        if self.path.exists():
            state = torch.load(self.path)
            for name in ("model", "ema", "muon", "adamw"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.windows, used = state["step"], state["windows"], state["used"]
        self.schedule = Schedule(args.minutes, used, fall=args.fall)

    def save(self) -> None:
        state: dict[str, Any] = {k: getattr(self, k).state_dict() for k in ("model", "ema", "muon", "adamw")}
        state |= {"step": self.step, "windows": self.windows, "used": self.schedule.used}
        save_state(self.path, state)

    def train_on(self, latents: torch.Tensor, ids: list[torch.Tensor]) -> float:
        factor = self.schedule.tick()
        for optimizer, lr in ((self.muon, self.args.lr), (self.adamw, 0.6 * self.args.lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.sibling.loss(latents, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step()
        self.adamw.step()
        self.step += 1
        self.windows += round(latents.shape[0] * latents[0, 0].numel() / architecture.NATIVE**2)
        update_ema(self.ema, self.model, self.step, self.args.ema)
        return float(loss.detach())


def train(args: argparse.Namespace) -> None:
    trainer = Trainer(args)
    cache = torch.load(args.cache)["entries"]
    held = torch.load(args.cache.with_suffix(".held"))["entries"]
    rng = np.random.default_rng(args.seed + trainer.step)
    torch.manual_seed(args.seed + trainer.step)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))

    def report(log: list[float]) -> None:
        losses = held_out_loss(trainer.sibling, trainer.ema, held)
        levels = " ".join(f"{x:.3f}" for x in losses)
        print(
            f"{args.kind} step {trainer.step} windows {trainer.windows} min {trainer.schedule.used / 60:.1f} "
            f"train {np.mean(log or [0]):.4f} held-out {np.mean(losses):.4f} at levels {levels}",
            flush=True,
        )
        log.clear()

    def batch() -> tuple[torch.Tensor, list[torch.Tensor]]:
        latents, prompts = draw(cache, rng, args.batch * architecture.NATIVE**2)
        return latents, trainer.sibling.tokenize(prompts)

    log: list[float] = []
    report(log)
    batches = prefetch(batch)
    while not trainer.schedule.done and not stop:
        log.append(trainer.train_on(*next(batches)))
        if trainer.step % 100 == 0:
            trainer.save()
        if trainer.step % args.report == 0:
            report(log)
    trainer.save()
    report(log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=SIBLINGS, default="unet")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--cache", type=Path, default=WORK / "latents.pt")
    parser.add_argument("--minutes", type=float, default=120, help="in all, those used before included")
    parser.add_argument("--fall", type=float, default=0.5, help="share of the minutes over which the rate falls")
    parser.add_argument("--batch", type=int, default=12, help="32x32 latents per step, or the same area of other sizes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--report", type=int, default=200, help="steps between figures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
