"""Train an embedded checkpoint from scratch: ``python -m tiledcore.models.train --denoiser unet|flux``.

Four stages, each of which resumes from ``--work`` and is skipped when done: the autoencoder, a cache of
its latents, the denoiser with its text encoders, and the export as a diffusers folder. The learning
rate falls with the share of ``--vae-minutes`` / ``--minutes`` used, so the same script serves two CPU
cores and one GPU. The UNet has v-prediction with zero terminal SNR (Salimans & Ho 2022, Lin et al.
2024), the transformer a rectified flow (Liu et al. 2023); both EMA of the weights, 10 % guidance dropout
(Ho & Salimans 2022), and many sizes and aspect ratios as in SDXL (Podell et al. 2023).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, StableDiffusionPipeline

from tiledcore.models import EARTH, EARTH_FLUX, architecture, data

CROP = 384  # px; cached latents are 48x48 and smaller training sizes are windows of them
# (height, width) in latent pixels; the batch is chosen so that every step sees about the same area.
SIZES = [(32, 32), (16, 16), (24, 24), (32, 16), (16, 32), (48, 48), (24, 40), (40, 24), (32, 48), (48, 32)]
SIZE_WEIGHTS = [0.30, 0.26, 0.10, 0.06, 0.06, 0.06, 0.04, 0.04, 0.04, 0.04]


class Schedule:
    """Minutes used so far, over restarts; learning rate warm-up then cosine to a fiftieth."""

    def __init__(self, minutes: float, lr: float, used: float = 0.0) -> None:
        self.budget, self.lr, self.used = 60 * minutes, lr, used
        self.last = time.monotonic()

    def tick(self, step: int) -> float:
        now = time.monotonic()
        self.used += min(now - self.last, 10.0)  # a suspended process does not use up its budget
        self.last = now
        progress = min(self.used / self.budget, 1.0)
        return self.lr * min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    @property
    def done(self) -> bool:
        return self.used >= self.budget


def prefetch(make: Callable[[], Any], depth: int = 4) -> Iterator[Any]:
    """Run ``make`` in a background thread, a few batches ahead."""
    batches: queue.Queue[Any] = queue.Queue(depth)

    def work() -> None:
        while True:
            batches.put(make())

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield batches.get()


def save_state(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def to_float(images: np.ndarray[Any, Any]) -> torch.Tensor:
    """``uint8 [N,H,W,3]`` -> ``float32 [N,3,H,W]`` in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def detail_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """L1 on the image and on its finite differences at three scales: edges count as much as tones."""
    loss = (x - y).abs().mean()
    for _ in range(3):
        loss = loss + ((x - y).diff(dim=-1).abs().mean() + (x - y).diff(dim=-2).abs().mean()) / 2
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return loss


def train_vae(args: argparse.Namespace, crops: list[data.Crop]) -> None:
    vae = architecture.build_vae().to(args.device)
    ema = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule, step = Schedule(args.vae_minutes, 4e-4), 0
    path = args.work / "vae.pt"
    if path.exists():
        state = torch.load(path, map_location=args.device)
        vae.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, schedule.used = state["step"], state["used"]
    rng = np.random.default_rng(args.seed + step)

    def batch() -> torch.Tensor:
        # Large windows at the end: the statistics of GroupNorm and the middle attention reach over them.
        size, count = (128, args.vae_batch) if schedule.used < 0.6 * schedule.budget else (256, args.vae_batch // 3)
        windows = []
        for i in rng.integers(0, len(crops), count):
            y, x = rng.integers(0, CROP - size + 1, 2)
            windows.append(crops[i].image[y : y + size, x : x + size])
        return to_float(np.stack(windows))

    batches = prefetch(batch)
    log = 0.0
    while not schedule.done:
        for group in optimizer.param_groups:
            group["lr"] = schedule.tick(step)
        x = next(batches).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        loss = detail_loss(y.float(), x) + 1e-5 * posterior.kl().float().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        update_ema(ema, vae, step, 0.995)
        log += float(loss.detach())
        if step % 100 == 0:
            print(f"vae step {step} min {schedule.used / 60:.1f} loss {log / 100:.4f}", flush=True)
            log = 0.0
        if step % 500 == 0 or schedule.done:
            state = {"model": vae.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(path, state | {"step": step, "used": schedule.used})


def update_ema(ema: torch.nn.Module, model: torch.nn.Module, step: int, longest: float) -> None:
    decay = min(longest, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def load_vae(args: argparse.Namespace) -> Any:
    vae = architecture.build_vae()
    vae.load_state_dict(torch.load(args.work / "vae.pt", map_location="cpu")["ema"])
    return vae.to(args.device).requires_grad_(False).eval()


def cache_latents(args: argparse.Namespace, crops: list[data.Crop]) -> None:
    """Encode the crops once: ``latents fp16 [N,8,48,48]``, ``fractions uint8 [N,7,48,48]``, scale, style."""
    vae, latents = load_vae(args), []
    for start in range(0, len(crops), 4):
        images = to_float(np.stack([c.image for c in crops[start : start + 4]]))
        with torch.autocast(args.device, torch.bfloat16):
            latents.append(vae.encode(images.to(args.device)).latent_dist.mean.half().cpu())
        if start % 400 == 0:
            print(f"latents {start}/{len(crops)}", flush=True)
    z = torch.cat(latents)
    save_state(
        args.work / "latents.pt",
        {
            "latents": z,
            "mean": z.float().mean((0, 2, 3)),
            "std": z.float().std((0, 2, 3)),
            "fractions": torch.from_numpy(np.stack([c.fractions for c in crops])),
            "scale": [c.scale for c in crops],
            "style": [c.style for c in crops],
        },
    )


def standardise(vae: Any, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold the latents' mean and standard deviation per channel into the two 1x1 convolutions at their ends.

    The images that the VAE decodes do not change; its latents get unit variance, as diffusion wants them.
    """
    n = len(mean)
    with torch.no_grad():
        vae.quant_conv.bias[:n] -= mean
        vae.quant_conv.bias[:n] /= std
        vae.quant_conv.weight[:n] /= std.view(-1, 1, 1, 1)
        vae.quant_conv.bias[n:] -= 2 * std.log()
        weight = vae.post_quant_conv.weight
        vae.post_quant_conv.bias += (weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
        weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)  # FLUX wants both, SD the first


def make_batch(cache: dict[str, Any], rng: np.random.Generator, area: int) -> tuple[torch.Tensor, list[str]]:
    """Windows of one size from cached latents, with prompts for exactly those windows."""
    h, w = SIZES[rng.choice(len(SIZES), p=SIZE_WEIGHTS)]
    latents, prompts = [], []
    for i in rng.integers(0, len(cache["latents"]), max(1, round(area / (h * w)))):
        y, x = (int(rng.integers(0, CROP // 8 - n + 1)) for n in (h, w))
        latents.append(cache["latents"][i, :, y : y + h, x : x + w])
        fractions = cache["fractions"][i, :, y : y + h, x : x + w].double().mean((1, 2)).numpy() / 255
        text = data.prompt(cache["style"][i], fractions, cache["scale"][i], rng)
        prompts.append("" if rng.random() < 0.1 else text)
    mean, std = (cache[k].view(-1, 1, 1) for k in ("mean", "std"))
    return (torch.stack(latents).float() - mean) / std, prompts


class UNetSibling:
    """Stable Diffusion: UNet and CLIP, v-prediction."""

    def __init__(self, work: Path) -> None:
        self.tokenizer = architecture.build_tokenizer(work / "tokenizer")
        self.alphas = architecture.build_scheduler().alphas_cumprod
        text_encoder = architecture.build_text_encoder(self.tokenizer)
        self.model = torch.nn.ModuleDict({"unet": architecture.build_unet(), "text_encoder": text_encoder})

    def tokenize(self, prompts: list[str]) -> list[torch.Tensor]:
        return [self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids]

    def loss(self, latents: torch.Tensor, ids: list[torch.Tensor]) -> torch.Tensor:
        t = (stratified(len(latents), latents.device) * 1000).long().clamp(max=999)
        a = self.alphas.to(latents.device)[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        text = self.model["text_encoder"](ids[0])[0]
        v = self.model["unet"](a.sqrt() * latents + (1 - a).sqrt() * noise, t, text).sample
        return F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * latents)

    def pipeline(self, vae: Any) -> Any:
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.model["text_encoder"],
            tokenizer=self.tokenizer,
            unet=self.model["unet"],
            scheduler=architecture.build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class FluxSibling:
    """FLUX: transformer, CLIP for the pooled text, T5 for its tokens, rectified flow."""

    def __init__(self, work: Path) -> None:
        self.tokenizer = architecture.build_tokenizer(work / "tokenizer")
        self.tokenizer_2 = architecture.build_t5_tokenizer(work / "tokenizer_2")
        self.model = torch.nn.ModuleDict(
            {
                "transformer": architecture.build_transformer(),
                "text_encoder": architecture.build_text_encoder(self.tokenizer),
                "text_encoder_2": architecture.build_t5_encoder(self.tokenizer_2),
            }
        )

    def tokenize(self, prompts: list[str]) -> list[torch.Tensor]:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        options["max_length"] = architecture.PROMPT_TOKENS
        return [tokenizer(prompts, **options).input_ids for tokenizer in (self.tokenizer, self.tokenizer_2)]

    def loss(self, latents: torch.Tensor, ids: list[torch.Tensor]) -> torch.Tensor:
        """Noise levels are logit-normal (Esser et al. 2024), packing and positions the pipeline's own."""
        n, c, h, w = latents.shape
        device = latents.device
        u = stratified(n, device).clamp(1e-4, 1 - 1e-4)
        sigma = torch.sigmoid(torch.special.ndtri(u) + math.log(architecture.FLOW_SHIFT)).view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        mixed = (1 - sigma) * latents + sigma * noise
        prediction = self.model["transformer"](
            hidden_states=FluxPipeline._pack_latents(mixed, n, c, h, w),
            timestep=sigma.view(-1),
            pooled_projections=self.model["text_encoder"](ids[0]).pooler_output,
            encoder_hidden_states=self.model["text_encoder_2"](ids[1])[0],
            txt_ids=torch.zeros(architecture.PROMPT_TOKENS, 3, device=device),
            img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, device, torch.float32),
        ).sample
        return F.mse_loss(prediction.float(), FluxPipeline._pack_latents(noise - latents, n, c, h, w))

    def pipeline(self, vae: Any) -> Any:
        return FluxPipeline(
            vae=vae,
            text_encoder=self.model["text_encoder"],
            tokenizer=self.tokenizer,
            text_encoder_2=self.model["text_encoder_2"],
            tokenizer_2=self.tokenizer_2,
            transformer=self.model["transformer"],
            scheduler=architecture.build_flow_scheduler(),
        )


SIBLINGS: dict[str, type[UNetSibling] | type[FluxSibling]] = {"unet": UNetSibling, "flux": FluxSibling}


def stratified(n: int, device: torch.device) -> torch.Tensor:
    """One random number from each n-th of 0..1: the same spread of noise levels in every step."""
    return (torch.arange(n, device=device) + torch.rand(n, device=device)) / n


def train_denoiser(args: argparse.Namespace) -> None:
    sibling = SIBLINGS[args.denoiser](args.work)
    model = sibling.model.to(args.device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule, step = Schedule(args.minutes, args.lr), 0
    path = args.work / f"{args.denoiser}.pt"
    if path.exists():
        state = torch.load(path, map_location=args.device)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, schedule.used = state["step"], state["used"]
    cache = torch.load(args.work / "latents.pt")
    rng = np.random.default_rng(args.seed + 2 + step)

    def batch() -> tuple[torch.Tensor, list[torch.Tensor]]:
        latents, prompts = make_batch(cache, rng, args.batch * architecture.NATIVE**2)
        return latents, sibling.tokenize(prompts)

    batches = prefetch(batch)
    log = 0.0
    while not schedule.done:
        for group in optimizer.param_groups:
            group["lr"] = schedule.tick(step)
        latents, ids = next(batches)
        with torch.autocast(args.device, torch.bfloat16):
            loss = sibling.loss(latents.to(args.device), [i.to(args.device) for i in ids])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        update_ema(ema, model, step, 0.999)
        log += float(loss.detach())
        if step % 50 == 0:
            print(f"{args.denoiser} step {step} min {schedule.used / 60:.1f} loss {log / 50:.4f}", flush=True)
            log = 0.0
        if step % 250 == 0 or schedule.done:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(path, state | {"step": step, "used": schedule.used})


def export(args: argparse.Namespace) -> None:
    """Write the EMA weights in fp16 as an ordinary diffusers folder; FLUX's shares the UNet's autoencoder."""
    cache = torch.load(args.work / "latents.pt")
    vae = load_vae(args).cpu()
    standardise(vae, cache["mean"], cache["std"])
    sibling = SIBLINGS[args.denoiser](args.work)
    sibling.model.load_state_dict(torch.load(args.work / f"{args.denoiser}.pt", map_location="cpu")["ema"])
    sibling.pipeline(vae).to(torch.float16).save_pretrained(args.out)
    if args.denoiser == "flux":
        shutil.rmtree(args.out / "vae")
    # diffusers opens in float32 unless asked otherwise; transformers goes by what the config says.
    for config in args.out.glob("text_encoder*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/earth"), help="checkpoints and cached latents")
    parser.add_argument("--denoiser", choices=SIBLINGS, default="unet")
    parser.add_argument("--out", type=Path, help="default: the embedded checkpoint itself")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-minutes", type=float, default=20)
    parser.add_argument("--vae-batch", type=int, default=3, help="128x128 px windows per step")
    parser.add_argument("--crops", type=int, default=2000, help="of 384x384 px, cut once")
    parser.add_argument("--minutes", type=float, default=120, help="for the denoiser")
    parser.add_argument("--batch", type=int, default=8, help="32x32 latents per step, or the same area of other sizes")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out = args.out or {"unet": EARTH, "flux": EARTH_FLUX}[args.denoiser]
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if not (args.work / "latents.pt").exists():
        rasters, rng = data.load_rasters(), np.random.default_rng(args.seed + 1)
        crops = [data.random_crop(rasters, CROP, rng) for _ in range(args.crops)]
        train_vae(args, crops)
        cache_latents(args, crops)
        del rasters, crops
    train_denoiser(args)
    export(args)


if __name__ == "__main__":
    main()
