"""Muon (Jordan et al. 2024): momentum whose update of each weight matrix is made orthogonal. AdamW for the rest."""

from __future__ import annotations

import torch

# Coefficients of the quintic Newton-Schulz iteration, from the reference implementation.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix with singular values about 1, for each of a batch ``[N, rows, columns]``, in bfloat16."""
    x = g.bfloat16()
    turned = x.shape[1] > x.shape[2]
    if turned:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True).bfloat16() + 1e-7)
    for _ in range(steps):
        a = x @ x.transpose(1, 2)
        x = _A * x + (_B * a + _C * (a @ a)) @ x
    return x.transpose(1, 2) if turned else x


class Muon(torch.optim.Optimizer):
    """For matrices and convolution kernels (flattened to ``[out, in * height * width]``).

    The update has the root mean square of about 0.2 that AdamW's have (Liu et al. 2025), so both can
    share a learning rate. Parameters of equal shape are orthogonalised in one batched product.
    """

    def __init__(
        self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.flatten(1).shape, []).append(p)
            for shape, params in shapes.items():
                directions = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    assert p.grad is not None
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    directions.append(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                updates = orthogonal(torch.stack(directions)).float() * (0.2 * max(shape) ** 0.5)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"])


def split(model: torch.nn.Module, inner: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Parameters of ``model`` for Muon and for AdamW.

    Muon takes matrices and kernels of ``inner``, but not those of its first and last layer.
    """
    matrices = {
        id(p)
        for name, p in inner.named_parameters()
        if p.ndim >= 2 and not name.startswith(("conv_in", "conv_out", "x_embedder", "proj_out"))
    }
    parameters = list(model.parameters())
    return [p for p in parameters if id(p) in matrices], [p for p in parameters if id(p) not in matrices]
