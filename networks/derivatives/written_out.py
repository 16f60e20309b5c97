"""Where a gradient of a gradient is wanted: operations whose second derivative is written out take torch's places."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from networks.derivatives.convolutions import conv2d
from networks.derivatives.standardisation import Standardised


class WrittenOut(TorchFunctionMode):
    """Within this context, with gradients on, convolutions and weight standardisation are ours, whoever calls them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if func is F.conv2d:
                return conv2d(*args, **kwargs)
            if func is F.batch_norm and _standardises(*args, **kwargs):
                return Standardised.apply(args[0], kwargs["weight"], kwargs["eps"])
        return func(*args, **kwargs)


def _standardises(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """As timm's standardised convolutions call batch normalisation: of one picture, without statistics or bias."""
    return training and input.ndim == 3 and len(input) == 1 and running_mean is bias is None and weight is not None
