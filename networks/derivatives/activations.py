"""Activations that keep little for a gradient of a gradient, or have one at all.

torch's SiLU writes its differentiable backward out in elementary operations and keeps all their results, six tensors
of the activation's size; here the backward is one operation with a derivative in closed form, and two are kept.
(torch's GELU and ReLU are like that already.) torch's hard sigmoid can be differentiated only once.
"""

import torch
import torch.nn.functional as F
from torch import nn


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx, grad):
        return _SiLUGradient.apply(grad, *ctx.saved_tensors)


class _SiLUGradient(torch.autograd.Function):
    """(g, x) -> g · silu'(x), with silu' = σ (1 + x (1 − σ)) and silu'' = σ (1 − σ) (2 + x (1 − 2σ))."""

    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return torch.ops.aten.silu_backward(grad, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, vector):
        grad, x = ctx.saved_tensors
        of_grad = torch.ops.aten.silu_backward(vector, x)
        sigmoid = torch.sigmoid(x)
        curvature = (1 - 2 * sigmoid).mul_(x).add_(2).mul_(sigmoid).mul_(sigmoid.neg_().add_(1))
        return of_grad, curvature.mul_(grad).mul_(vector)


class SiLU(nn.Module):
    """x · σ(x), differentiable twice."""

    def forward(self, x):
        return _SiLU.apply(x)


class _Hardsigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.hardsigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        slope = ((x > -3) & (x < 3)).to(grad.dtype) / 6
        return grad * slope


class Hardsigmoid(nn.Module):
    """x / 6 + 1 / 2 between 0 and 1, differentiable twice."""

    def forward(self, x):
        return _Hardsigmoid.apply(x)


REPLACED = {nn.SiLU: SiLU, nn.Hardsigmoid: Hardsigmoid}


def replace_activations(model: nn.Module) -> None:
    """Puts `SiLU` and `Hardsigmoid` in the places of torch's. Names stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            for old, new in REPLACED.items():
                if isinstance(child, old):
                    setattr(module, name, new())
