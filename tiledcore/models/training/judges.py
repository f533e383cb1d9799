"""Small networks that judge samples: one tells them from real crops, one reads style and content off an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from . import data
from .common import save_state, to_float
from .metrics import Images

WINDOW = 128  # px; judges look at windows, so that each image gives several examples


def network(outputs: int, width: int = 32) -> nn.Module:
    """Five strided convolutions, then the mean over the window."""
    layers: list[nn.Module] = []
    before = 3
    for i in range(5):
        after = width * min(2**i, 4)
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, outputs))


def to_windows(images: Images) -> torch.Tensor:
    """The disjoint windows of all images, ``[N * k, 3, WINDOW, WINDOW]`` in -1..1."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float().permute(0, 3, 1, 2) * 2 - 1
    x = x.unfold(2, WINDOW, WINDOW).unfold(3, WINDOW, WINDOW)
    return x.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, WINDOW, WINDOW)


def two_sample_accuracy(made: Images, real: Images, steps: int = 300, seed: int = 0) -> float:
    """How often a network tells samples from real crops: 0.5 is perfect, 1 is always (Lopez-Paz & Oquab 2017).

    It learns from the even images of both sets and is tested on windows of the odd ones.
    """
    torch.manual_seed(seed)
    sets = [[to_windows(images[k::2]) for images in (real, made)] for k in (0, 1)]
    (x, y), (test_x, test_y) = (
        (torch.cat(pair), torch.cat([torch.full((len(w),), float(i)) for i, w in enumerate(pair)])) for pair in sets
    )
    net = network(1)
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(steps):
        i = torch.randint(len(x), (32,))
        # Small shifts: the network must not learn its windows by heart.
        batch = torch.roll(x[i], tuple(int(s) for s in torch.randint(-16, 17, (2,))), (2, 3))
        loss = F.binary_cross_entropy_with_logits(net(batch)[:, 0], y[i])
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        return float(((net(test_x)[:, 0] > 0).float() == test_y).float().mean())


@dataclass(frozen=True)
class Reading:
    """What the reader sees in each image: style number ``int [N]`` and class fractions ``float [N, 7]``."""

    style: NDArray[np.int64]
    fractions: NDArray[np.float64]


def train_reader(rasters: data.Rasters, steps: int = 600, seed: int = 0) -> nn.Module:
    """A network that reads style and class fractions off a window, learned from real training crops."""
    torch.manual_seed(seed)
    rng, styles, rate = np.random.default_rng(seed), list(data.STYLES), 2e-3
    net = network(len(styles) + len(data.CLASSES))
    adam = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-2)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        crops = [data.random_crop(rasters, WINDOW, rng) for _ in range(24)]
        out = net(to_float(np.stack([c.image for c in crops])))
        style = torch.tensor([styles.index(c.style) for c in crops])
        fractions = torch.from_numpy(np.stack([c.fractions.mean((1, 2)) / 255 for c in crops])).float()
        loss = F.cross_entropy(out[:, :3], style) + 7 * F.binary_cross_entropy_with_logits(out[:, 3:], fractions)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net.eval()


def reader(rasters: data.Rasters, path: Path) -> nn.Module:
    """The reader saved at ``path``; trained and saved there where there is none."""
    if path.exists():
        net = network(len(data.STYLES) + len(data.CLASSES))
        net.load_state_dict(torch.load(path))
        return net.eval()
    net = train_reader(rasters)
    save_state(path, net.state_dict())
    return net


@torch.no_grad()
def read(net: nn.Module, images: Images) -> Reading:
    """Mean over the windows of each image."""
    out = net(to_windows(images))
    out = out.view(len(images), -1, out.shape[1])
    return Reading(out[:, :, :3].mean(1).argmax(1).numpy(), out[:, :, 3:].sigmoid().mean(1).double().numpy())


def obedience(seen: Reading, style: NDArray[np.int64], asked: NDArray[np.float64]) -> dict[str, float]:
    """Share of right styles, and for each class the correlation of the fraction asked for with that seen."""
    result = {"style": float((seen.style == style).mean())}
    for k, name in enumerate(data.CLASSES):
        result[name] = float(np.corrcoef(seen.fractions[:, k], asked[:, k])[0, 1])
    return {name: round(value, 3) for name, value in result.items()}
