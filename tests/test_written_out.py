"""Operations with a second derivative of their own, against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.derivatives.convolutions import Convolution
from networks.derivatives.standardisation import Standardised
from networks.derivatives.written_out import WrittenOut
from networks.image_encoder import build_image_encoder
from tests.unroll import Problem, check_matching, relative_error, unroll_gradient
from utils.student import matching_gradient

KINDS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "without bias": nn.Conv2d(4, 6, 3, bias=False),
    "strides": nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0)),
    "dilation": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "groups": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, 5, groups=4, stride=2, padding=2),
    "one by one": nn.Conv2d(4, 6, 1),
    "one that no kernel covers whole": nn.Conv2d(4, 6, 2, stride=3),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
}


def double_backward(function, inputs, vectors):
    """First derivatives of Σ f(inputs)³, and those of their product with `vectors`."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
    product = sum((grad * vector).sum() for grad, vector in zip(first, vectors, strict=True))
    return [*first, *torch.autograd.grad(product, inputs)]


@pytest.mark.parametrize("kind", KINDS)
def test_both_derivatives_are_torchs(kind):
    torch.manual_seed(0)
    conv = KINDS[kind].double()
    inputs = [torch.randn(3, 4, 9, 8, dtype=torch.float64), *conv.parameters()]
    vectors = [torch.randn_like(value) for value in inputs]

    def convolve(x, weight, bias=None):
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    expected = double_backward(convolve, inputs, vectors)
    with WrittenOut():
        values = double_backward(convolve, inputs, vectors)
    assert all(relative_error(value, wanted) < 1e-12 for value, wanted in zip(values, expected, strict=True))


@pytest.mark.parametrize("trains", ["picture", "weight"])
def test_a_side_that_needs_no_gradient_gets_none(trains):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    one, other = (x, weight) if trains == "picture" else (weight, x)

    def convolve(value):
        return F.conv2d(value, other) if trains == "picture" else F.conv2d(other, value)

    vector = [torch.randn_like(one)]
    expected = double_backward(convolve, [one], vector)
    with WrittenOut():
        values = double_backward(convolve, [one], vector)
    assert all(relative_error(value, wanted) < 1e-12 for value, wanted in zip(values, expected, strict=True))


@pytest.mark.parametrize("name", ["test_nfnet", "test_efficientnet", "test_byobnet", "test_convnext"])
def test_every_convolution_of_an_encoder_is_met(name, monkeypatch):
    """Weight-standardised, grouped and padded ones too: torch's own are not called where gradients are wanted."""
    met, apply = [], Convolution.apply
    monkeypatch.setattr(Convolution, "apply", lambda *args: (met.append(1), apply(*args))[1])
    torch.manual_seed(0)
    encoder = build_image_encoder(name, 32, pretrained=False).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = encoder(images)
    with WrittenOut():
        value = encoder(images)
        with torch.no_grad():
            encoder(images)
    assert len(met) == sum(isinstance(module, nn.Conv2d) for module in encoder.modules())
    assert relative_error(value, expected) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_two_steps_of_torchvisions_models_have_the_gradient_of_the_full_unroll(name):
    """With activations in place, batch normalisation, dropout, hard sigmoids."""
    arguments = Problem(f"torchvision:{name}").arguments(2)
    check_matching(matching_gradient(*arguments), *unroll_gradient(*arguments))


def test_autocast_computes_in_half_precision():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), WrittenOut():
        value = F.conv2d(x, weight)
    assert value.dtype == torch.bfloat16
    grads = torch.autograd.grad(value.float().pow(2).sum(), [x, weight], create_graph=True)
    seconds = torch.autograd.grad(grads[0].sum() + grads[1].sum(), [x, weight])
    assert all(grad.dtype == torch.float32 for grad in (*grads, *seconds))


@pytest.mark.parametrize("shape", [(6, 9), (1, 4), (5, 2)])
def test_standardised_weights_have_torchs_derivatives(shape, monkeypatch):
    """A gain of zero too, as the last convolutions of a block start with."""
    met, apply = [], Standardised.apply
    monkeypatch.setattr(Standardised, "apply", lambda *args: (met.append(1), apply(*args))[1])
    torch.manual_seed(0)
    inputs = [torch.randn(1, *shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)]
    inputs[1][0] = 0.0
    vectors, target = [torch.randn_like(value) for value in inputs], torch.randn(1, *shape, dtype=torch.float64)

    def standardise(weight, gain):
        return target + F.batch_norm(weight, None, None, weight=gain, training=True, momentum=0.0, eps=1e-3)

    expected = double_backward(standardise, inputs, vectors)
    with WrittenOut():
        values = double_backward(standardise, inputs, vectors)
    assert len(met) == 1
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


def test_a_batch_is_normalised_by_torch():
    """Of pictures, with statistics or a bias: not weights."""
    x, weight = torch.randn(2, 3, 4), torch.ones(3)
    with WrittenOut():
        value = F.batch_norm(x, None, None, weight=weight, training=True)
        stored = F.batch_norm(x[:1], torch.zeros(3), torch.ones(3), weight=weight)
    assert torch.equal(value, F.batch_norm(x, None, None, weight=weight, training=True))
    assert torch.equal(stored, F.batch_norm(x[:1], torch.zeros(3), torch.ones(3), weight=weight))
