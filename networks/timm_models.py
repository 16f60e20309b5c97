"""timm's models without their classifier; the same functions as those of networks/torchvision_models.py."""

import timm
import torch
from torch import nn


def is_model(name: str) -> bool:
    """Whether timm has it; NAME.TAG, which names weights, is the model NAME."""
    return timm.is_model(name.split(".")[0])


def list_names() -> list[str]:
    return timm.list_models()


def create_model(name: str, image_size: int, download: bool, kwargs: dict) -> nn.Module:
    """The model that maps pictures [B, 3, H, W] to pooled features [B, D]; its weights are published ones or random.

    Args:
        image_size: side of the square input in pixels; models with a fixed input size are built for it.
        download: load the published weights.
        kwargs: further arguments of `timm.create_model`.

    Raises:
        OSError, RuntimeError, TypeError, AssertionError, ValueError: what timm raises for arguments and sizes that it
            refuses and for weights that cannot be had.
    """
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        kwargs.setdefault("img_size", image_size)
    model = timm.create_model(name, pretrained=download, num_classes=0, **kwargs)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    return model
