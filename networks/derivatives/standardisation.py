"""Weight standardisation whose second derivative is written out.

timm's networks without normalisation standardise the weights of each convolution, as a batch normalisation of one
picture with a channel an output (Qiao et al., 2019). torch writes its second derivative in some sixty small operations
for every layer, which keeps a card waiting for its host; here they are about twenty.

Of n weights w of an output, with x̂ = (w − mean) r, r = 1 / √(variance + ε), y = γ x̂, P v = v − mean(v) − x̂ mean(x̂ v),
a gradient g of y gives w the gradient γ r P g and γ the gradient Σ g x̂. With cotangents v and u of these two:

    ∂/∂g = γ r P v + u x̂,  ∂/∂γ = ⟨r P v, g⟩,
    ∂/∂w = (u − γ r mean(x̂ v)) r P g − γ r mean(x̂ g) r P v − (γ r / n) ⟨r P v, g⟩ x̂.
"""

import torch
from torch.autograd.function import once_differentiable


class Standardised(torch.autograd.Function):
    """(w, γ, ε) -> y: [1, C, n], [C] and a number -> [1, C, n]."""

    @staticmethod
    def forward(ctx, weight, gain, eps):
        value, mean, scale = torch.ops.aten.native_batch_norm(weight, gain, None, None, None, True, 0.0, eps)
        ctx.save_for_backward(weight, gain, mean, scale)
        ctx.eps = eps
        return value

    @staticmethod
    def backward(ctx, grad):
        return *_StandardisedGradient.apply(grad, *ctx.saved_tensors, ctx.eps), None


class _StandardisedGradient(torch.autograd.Function):
    """(g, w, γ, mean, r) -> the gradients of w and of γ."""

    @staticmethod
    def forward(ctx, grad, weight, gain, mean, scale, eps):
        ctx.save_for_backward(grad, weight, gain, mean, scale)
        ctx.eps = eps
        return _first(grad, weight, gain, mean, scale, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, vector, vector_gain):
        grad, weight, gain, mean, scale = ctx.saved_tensors
        one, count = torch.ones_like(gain), weight.size(2)
        grad_projected, grad_sum = _first(grad, weight, one, mean, scale, ctx.eps)  # r P g, Σ x̂ g
        projected, vector_sum = _first(vector, weight, one, mean, scale, ctx.eps)  # r P v, Σ x̂ v
        gain_scale = gain * scale
        product = (projected * grad).sum((0, 2))
        standard = (weight - _columns(mean)).mul_(_columns(scale))
        of_grad = torch.addcmul(standard * _columns(vector_gain), projected, _columns(gain))
        share = gain_scale / count
        of_weight = grad_projected.mul_(_columns(vector_gain - share * vector_sum))
        of_weight.addcmul_(projected, _columns(share * grad_sum), value=-1)
        of_weight.addcmul_(standard, _columns(share * product), value=-1)
        return of_grad, of_weight, product, None, None, None


def _first(grad, weight, gain, mean, scale, eps):
    settings = True, eps, [True, True, False]
    return torch.ops.aten.native_batch_norm_backward(grad, weight, gain, None, None, mean, scale, *settings)[:2]


def _columns(values):
    return values[:, None]
