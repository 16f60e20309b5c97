"""Augmentation of square pictures that are tensors already: on a GPU in batches, in a loader's worker one by one."""

import functools
import math

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from data.transforms import MAX_TRANSLATION

MARGIN = 8 / 7  # side of a cached picture to that of the network's input: 256 for 224


def cached_side(image_size: int, no_aug: bool = False) -> int:
    """Side in pixels of the cached picture for an input of `image_size`: a bit larger, that crops stay possible."""
    return image_size if no_aug else round(image_size * MARGIN)


class Augment:
    """What `data.transforms.train_transform` does, on uint8 [B, 3, S, S] -> uint8 [B, 3, image_size, image_size].

    Each picture draws for itself, from torch's CPU generator. It deviates from the transform of undecoded pictures:
    crops are taken from the squashed square of S pixels, not from the picture in its own shape and resolution; shears
    and turns are about the centre and bilinear. Brightness and Sharpness, no change at magnitude 5, are left out.
    """

    LAYERS, PROBABILITY, DRAWN_FROM = 2, 0.5, 20  # ten operations in both directions; three leave the picture as it is

    def __init__(self, image_size: int):
        self.crop = v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)
        shift, shear = max(1, round(0.5 * MAX_TRANSLATION * image_size)), math.degrees(math.atan(0.15))
        self.operations = [F.autocontrast, F.autocontrast, F.equalize, F.equalize]
        for sign in (-1, 1):
            self.operations += [
                functools.partial(_affine, shear=[sign * shear, 0.0]),
                functools.partial(_affine, shear=[0.0, sign * shear]),
                functools.partial(_affine, translate=[sign * shift, 0]),
                functools.partial(_affine, translate=[0, sign * shift]),
                functools.partial(_affine, angle=sign * 15.0),
            ]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = torch.stack([self.crop(image) for image in images])
        _apply(F.horizontal_flip, images, torch.rand(len(images)) < 0.5)
        for _ in range(self.LAYERS):
            acts = torch.rand(len(images)) < self.PROBABILITY
            drawn = torch.randint(self.DRAWN_FROM, (len(images),))
            for number, operation in enumerate(self.operations):
                _apply(operation, images, acts & (drawn == number))
        return images

    def one(self, image: torch.Tensor) -> torch.Tensor:
        """The same for a single picture: uint8 [3, S, S] -> uint8 [3, image_size, image_size]."""
        return self(image[None])[0]


def _apply(operation, images, chosen: torch.Tensor) -> None:
    """Replaces the chosen pictures; `chosen` is a mask on the CPU, so that no GPU has to be waited for."""
    rows = chosen.nonzero().flatten()
    if len(rows):
        rows = rows.to(images.device, non_blocking=True)
        images[rows] = operation(images[rows])


def _affine(images, angle: float = 0.0, translate=(0, 0), shear=(0.0, 0.0)):
    placed = {"angle": angle, "translate": list(translate), "scale": 1.0, "shear": list(shear)}
    return F.affine(images, **placed, interpolation=InterpolationMode.BILINEAR, fill=[128.0] * 3)
