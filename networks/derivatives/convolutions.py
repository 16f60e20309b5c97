"""Convolutions whose second derivative is written out.

torch takes the weight's part of a convolution's second derivative as a forward convolution whose kernel is the picture,
group by group: several times the operations that are needed where groups are many, and a shape that libraries are
slow at. Here it is three ordinary convolutions. With g the gradient of conv(x, w), and cotangents v_x, v_w of the
gradients of x and w:

    ∂/∂g = conv(v_x, w) + conv(x, v_w),  ∂/∂x = the input's gradient with v_w as the weight,
    ∂/∂w = the weight's gradient with v_x as the input.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

_convolution, _backward = torch.ops.aten.convolution, torch.ops.aten.convolution_backward


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """`F.conv2d` by `Convolution`; in torch's own way where the padding is a word."""
    if isinstance(padding, str):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    where = input.device.type
    if torch.amp.is_autocast_available(where) and torch.is_autocast_enabled(where):
        dtype = torch.get_autocast_dtype(where)
        input, weight, bias = (None if t is None else t.to(dtype) for t in (input, weight, bias))
    settings = _pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups
    return Convolution.apply(input, weight, bias, settings)


def _pair(value) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class Convolution(torch.autograd.Function):
    """(x, w, b) -> conv(x, w) + b, [B, C, H, W]; `settings` are aten::convolution's after the bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, settings):
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return _convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad
        of_x, of_weight = _ConvolutionGradient.apply(grad, *ctx.saved_tensors, ctx.settings, wanted[0], wanted[1])
        return of_x, of_weight, grad.sum((0, 2, 3)) if wanted[2] else None, None


class _ConvolutionGradient(torch.autograd.Function):
    """(g, x, w) -> the gradients of x and of w."""

    @staticmethod
    def forward(ctx, grad, x, weight, settings, of_x, of_weight):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, weight)
        ctx.settings = settings
        return _backward(grad, x, weight, None, *settings, [of_x, of_weight, False])[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx, vector_x, vector_weight):
        grad, x, weight = ctx.saved_tensors
        settings, wanted = ctx.settings, ctx.needs_input_grad
        of_grad = of_x = of_weight = None
        if vector_x is not None:
            of_grad = _convolution(vector_x, weight, None, *settings)
            if wanted[2]:
                of_weight = _backward(grad, vector_x, weight, None, *settings, [False, True, False])[1]
        if vector_weight is not None:
            part = _convolution(x, vector_weight, None, *settings)
            of_grad = part if of_grad is None else of_grad.add_(part)
            if wanted[1]:
                of_x = _backward(grad, x, vector_weight, None, *settings, [True, False, False])[0]
        return of_grad, of_x, of_weight, None, None, None
