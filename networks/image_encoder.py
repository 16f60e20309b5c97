"""Image encoders: models of timm and torchvision by name, without their classifier."""

import contextlib
import difflib

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.errors import InputError
from networks.derivatives.activations import replace_activations

# The names of the paper and of the released scripts, and the timm models they stand for.
SHORT_NAMES = {
    "nfnet": "nfnet_l0",
    "nf_resnet50": "nf_resnet50",
    "nf_regnet": "nf_regnet_b1",
    "vit": "vit_tiny_patch16_224",
    "vit_tiny": "vit_tiny_patch16_224",
    "clip": "vit_base_patch32_clip_224.openai",
}
TORCHVISION = "torchvision:"  # before the name of a model of torchvision
HUB_PREFIXES = ("hf_hub:", "hf-hub:", "timm/")  # of a timm model's name, as Hugging Face writes it
# Before the keys of a checkpoint: of data parallel training, of a model around the encoder, of CLIP's image tower.
KEY_PREFIXES = ("module.", "model.", "backbone.", "visual.")


class ImageEncoder(nn.Module):
    """A model of timm or torchvision that maps normalised pixels to pooled features.

    Batch normalisation always uses its stored statistics: running statistics move outside the
    trajectory of parameters, so a student could not follow an expert that updates them.
    Attention runs unfused, because the fused kernels cannot be differentiated twice, and SiLU as in
    networks/derivatives/activations.py, which keeps less for it.

    Attributes:
        width: number of features D.
        mean, std: the normalisation that the weights were trained with, three floats each.
    """

    def __init__(self, model: nn.Module):
        from timm.data import resolve_model_data_config  # here, as in `_library`

        super().__init__()
        self.model = model
        self.width = model.num_features
        config = resolve_model_data_config(model)
        self.mean = tuple(float(v) for v in config["mean"])
        self.std = tuple(float(v) for v in config["std"])
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        self.has_torch_attention = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
        replace_activations(model)

    def train(self, mode: bool = True):
        super().train(mode and any(p.requires_grad for p in self.parameters()))  # frozen: one output for one input
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images):  # [B, 3, H, W]
        unfused = sdpa_kernel(SDPBackend.MATH) if self.has_torch_attention else contextlib.nullcontext()
        with unfused:
            return self.model(images)  # [B, D]


def build_image_encoder(
    name: str,
    image_size: int,
    pretrained: bool = True,
    checkpoint: str | None = None,
    kwargs: dict | None = None,
) -> ImageEncoder:
    """Builds the encoder `name`: a short name of the paper, any timm model or torchvision:NAME.

    Args:
        image_size: side of the square input in pixels; models with a fixed input size are built for it.
        pretrained: load the published weights (downloaded on first use). Ignored with `checkpoint`.
        checkpoint: safetensors or weights-only torch file with the state dict of the headless model.
        kwargs: further arguments of `timm.create_model` or of torchvision's function.

    Raises:
        InputError: unknown name, arguments or sizes the model refuses, weights that cannot be had.
    """
    plain = plain_name(name)
    plain = SHORT_NAMES.get(plain, plain)
    of_torchvision, library = plain.startswith(TORCHVISION), _library(plain)
    if not library.is_model(plain):
        raise InputError(f"unknown image encoder '{name}'{_nearest(plain)}")
    download = pretrained and checkpoint is None
    try:
        model = library.create_model(plain, image_size, download, dict(kwargs or {}))
    except (OSError, RuntimeError, TypeError, AssertionError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
        advice = "check --image_size and --image_kwargs"
        if download and not (of_torchvision and isinstance(error, TypeError | AssertionError | ValueError)):
            advice = "check the name's weights and the network, or give --image_checkpoint"
        raise InputError(f"cannot build image encoder '{name}' for {image_size} px ({reason}); {advice}") from error
    _check_size(model, name, image_size)
    if checkpoint is not None:
        _load_checkpoint(model, name, checkpoint)
    return ImageEncoder(model)


def _library(name: str):
    """The module that makes the model: networks/timm_models.py or torchvision_models.py."""
    # Imported here, as timm, torchvision and transformers everywhere: they take seconds, and --help and a wrong flag
    # do without them (tests/test_start.py).
    from networks import timm_models, torchvision_models

    return torchvision_models if name.startswith(TORCHVISION) else timm_models


def plain_name(name: str) -> str:
    """A timm model's name without the hub before it: hf_hub:timm/NAME and timm/NAME are NAME."""
    for prefix in HUB_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _check_size(model: nn.Module, name: str, image_size: int) -> None:
    """Raises InputError for pictures smaller than one cell of the last map of features: all else would be padding."""
    cell = max((layer["reduction"] for layer in getattr(model, "feature_info", [])), default=1)
    if image_size < cell:
        raise InputError(f"--image_size {image_size} is less than one cell of '{name}', {cell} px; give {cell} or more")


def _load_checkpoint(model: nn.Module, name: str, path: str) -> None:
    try:
        state = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, weights_only=True)
        model.load_state_dict(_fitting(state, model, path))
    except FileNotFoundError as error:
        raise InputError(f"image checkpoint {path} does not exist; check --image_checkpoint") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"image checkpoint {path} does not fit '{name}': {reason}") from error
    spoilt = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if spoilt:
        raise InputError(f"image checkpoint {path} has values in {spoilt[0]} that are not finite; give another file")


def _fitting(state: dict, model: nn.Module, path: str) -> dict:
    """The state dict under the model's own keys: unwrapped, without prefixes, without a classifier the model lacks."""
    for key in ("state_dict", "model", "model_state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    wanted = model.state_dict().keys()
    if any(".visual." in f".{key}" for key in state):  # the rest is another tower
        state = {key: value for key, value in state.items() if ".visual." in f".{key}"}
    named = {_without_prefixes(key, wanted): value for key, value in state.items()}
    classifiers = (model.pretrained_cfg or {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    dropped = [key for key in named if key not in wanted and key.startswith(tuple(f"{name}." for name in classifiers))]
    if dropped:
        print(f"{path}: left out its classifier, {', '.join(dropped)}")
    return {key: value for key, value in named.items() if key not in dropped}


def _without_prefixes(key: str, wanted) -> str:
    while key not in wanted and key.startswith(KEY_PREFIXES):
        key = key.partition(".")[2]
    return key


def _nearest(name: str) -> str:
    prefix, names, whole = "", [*SHORT_NAMES, *_library(name).list_names()], "timm.list_models()"
    if name.startswith(TORCHVISION):
        prefix, names, whole = TORCHVISION, _library(name).list_names(), "torchvision.models.list_models()"
    found = difflib.get_close_matches(name.removeprefix(prefix), names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(prefix + near for near in found)}?" if found else f"; see {whole}"
