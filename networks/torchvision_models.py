"""Classification models of torchvision without their classifier, in the form that timm gives its models."""

import inspect

import torch
from torch import nn
from torchvision import models

from data.errors import InputError
from networks.image_encoder import TORCHVISION

WITH_STRIDE = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def is_model(name: str) -> bool:
    return name.removeprefix(TORCHVISION) in list_names()


def list_names() -> list[str]:
    """Of every classification model, without the prefix."""
    return models.list_models(module=models)


def create_model(name: str, image_size: int, download: bool, kwargs: dict) -> nn.Module:
    """The model `torchvision:NAME` that maps pictures [B, 3, H, W] to pooled features [B, D], in eval mode.

    As a timm model it has `num_features`, which is D, and `pretrained_cfg`: mean and std of torchvision's best
    weights, and the names of the classifiers that were left out.

    Args:
        name: the prefix and one of `list_names()`.
        image_size: side of the square input in pixels; models with a fixed input size are built for it.
        download: load torchvision's best weights.
        kwargs: further arguments of torchvision's function.

    Raises:
        InputError: pictures too small for the model, or a model whose features are not the input of its last layer.
        OSError, RuntimeError, TypeError, AssertionError, ValueError: what torchvision raises for arguments that it
            refuses and for weights that cannot be had.
    """
    plain = name.removeprefix(TORCHVISION)
    arguments = {**_size_arguments(plain, image_size), **kwargs}
    model = models.get_model(plain, weights="DEFAULT" if download else None, **arguments).eval()
    if hasattr(model, "transform_input") and "transform_input" not in kwargs:
        model.transform_input = True  # the published weights expect it, in a file of --image_checkpoint too
    classifiers = [*_drop_auxiliary(model), _drop_classifier(model, name)]
    _check_pictures(model, name, image_size)
    weights = getattr(models.get_model_weights(plain), "DEFAULT", None)
    rule = weights.transforms() if weights else None
    of_weights = {key: getattr(rule, key, None) for key in ("mean", "std")}  # timm takes ImageNet's for None
    model.pretrained_cfg = {**of_weights, "classifier": classifiers}
    return model


def _size_arguments(name: str, image_size: int) -> dict:
    """What a model that is built for one size of pictures wants to know."""
    model_class = inspect.signature(models.get_model_builder(name)).return_annotation
    sizes = {"image_size": image_size, "input_size": (image_size, image_size)}
    return {key: size for key, size in sizes.items() if key in inspect.signature(model_class).parameters}


def _drop_auxiliary(model: nn.Module) -> list[str]:
    """Removes the classifiers that Inception and GoogLeNet have on the way, for training. Returns their names."""
    names = [name for name, _ in model.named_children() if name.lower().startswith("aux")]
    for name in names:
        setattr(model, name, None)
    if names:
        model.aux_logits = False
    return names


def _drop_classifier(model: nn.Module, name: str) -> str:
    """Removes the last Linear, or Conv2d as in SqueezeNet, with the dropout before it. Returns its name.

    Of what follows it the pooling stays. What is left keeps its names.
    """
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise InputError(f"'{name}' has no linear layer or convolution at its end to take features from")
    path, layer = layers[-1]
    model.num_features = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    above, _, own = path.rpartition(".")
    parent = model.get_submodule(above)
    if not isinstance(parent, nn.Sequential):
        setattr(parent, own, nn.Identity())
        return path
    children = list(parent.named_children())
    first = last = [child for _, child in children].index(layer)
    while first and isinstance(children[first - 1][1], nn.Dropout):
        first -= 1
    for number, (child_name, child) in enumerate(children[first:], first):
        if number <= last or not isinstance(child, nn.AdaptiveAvgPool2d):
            delattr(parent, child_name)
    return path


def _check_pictures(model: nn.Module, name: str, image_size: int) -> None:
    """Raises InputError for sizes that the model refuses or sees only padding of, and for features of another form."""
    hooks = [m.register_forward_pre_hook(_refuse_small_map) for m in model.modules() if isinstance(m, WITH_STRIDE)]
    try:
        with torch.no_grad():
            shape = tuple(model(torch.zeros(1, 3, image_size, image_size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise InputError(
            f"--image_size {image_size} does not suit '{name}' ({reason}); give a larger one or check --image_kwargs"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if shape != (1, model.num_features):
        raise InputError(
            f"'{name}' gives {list(shape)[1:]} without its last layer, not {model.num_features} pooled features; "
            "choose another model"
        )


def _refuse_small_map(layer: nn.Module, inputs: tuple) -> None:
    stride = layer.stride if isinstance(layer.stride, int) else max(layer.stride)
    side = min(inputs[0].shape[-2:])
    if side < stride:
        raise ValueError(f"a layer of stride {stride} gets {side} px")
