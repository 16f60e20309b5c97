"""Train and test transforms (PIL picture -> uint8 tensor), normalisation and its inverse."""

import functools

import torch

RAND_AUGMENT_OPS = [
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
    "Rotate",
]
MAX_TRANSLATION = 10 / 224  # of the picture's side at magnitude 10; timm's own 0.45 would push objects out


def _identity(image):
    return image


def train_transform(image_size: int, no_aug: bool = False):
    """Random crop, flip and RandAugment: PIL RGB picture -> uint8 [3, image_size, image_size].

    It draws from the modules torch, random and numpy. With `no_aug` it is `eval_transform`.
    """
    if no_aug:
        return eval_transform(image_size)
    from timm.data.auto_augment import RandAugment, rand_augment_ops  # slow to import: see networks/image_encoder.py
    from torchvision.transforms import InterpolationMode, v2

    hparams = {"translate_pct": MAX_TRANSLATION, "img_mean": (128, 128, 128)}
    ops = rand_augment_ops(magnitude=5, prob=0.5, hparams=hparams, transforms=RAND_AUGMENT_OPS)
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            RandAugment([*ops, _identity], num_layers=2),
            v2.PILToTensor(),
        ]
    )


def eval_transform(image_size: int):
    """Resize to the square, bicubic: PIL RGB picture -> uint8 [3, image_size, image_size]."""
    from torchvision.transforms import InterpolationMode, v2

    size = (image_size, image_size)
    return v2.Compose([v2.Resize(size, interpolation=InterpolationMode.BICUBIC), v2.PILToTensor()])


def normalize(images: torch.Tensor, mean, std) -> torch.Tensor:
    """uint8 [..., 3, H, W] in 0..255 -> float32 of the same shape, (images / 255 - mean) / std."""
    mean, std = channels(tuple(mean), images.device), channels(tuple(std), images.device)
    return (images.float() / 255 - mean) / std


def denormalize(images: torch.Tensor, mean, std) -> torch.Tensor:
    """Normalised float [..., 3, H, W] -> float in [0, 1], clamped: the inverse of `normalize`."""
    mean, std = channels(tuple(mean), images.device), channels(tuple(std), images.device)
    return (images * std + mean).clamp(0, 1)


@functools.cache  # made anew in every step, they would make the host wait for a GPU
def channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
