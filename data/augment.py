"""Augmentation of square pictures that are tensors already: on a GPU in batches, in a loader's worker one by one."""

import functools
import math

import torch
import torch.nn.functional as nn_functional

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
        from torchvision.transforms import InterpolationMode, v2  # slow to import: see networks/image_encoder.py
        from torchvision.transforms.v2 import functional as F

        self.crop = v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)
        # In units of half a side; a sign turns the direction round.
        shift, shear = 2 * max(1, round(0.5 * MAX_TRANSLATION * image_size)) / image_size, 0.15
        sine, cosine = math.sin(math.radians(15)), math.cos(math.radians(15))
        self.flip = F.horizontal_flip
        self.operations = [F.autocontrast, F.autocontrast, F.equalize, F.equalize]
        for sign in (-1, 1):
            self.operations += [
                functools.partial(_affine, ((1, sign * shear, 0), (0, 1, 0))),
                functools.partial(_affine, ((1, 0, 0), (sign * shear, 1, 0))),
                functools.partial(_affine, ((1, 0, sign * shift), (0, 1, 0))),
                functools.partial(_affine, ((1, 0, 0), (0, 1, sign * shift))),
                functools.partial(_affine, ((cosine, sign * sine, 0), (-sign * sine, cosine, 0))),
            ]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = torch.stack([self.crop(image) for image in images])
        _apply(self.flip, images, torch.rand(len(images)) < 0.5)
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


FILL = 128  # where a picture has moved away


def _affine(matrix, images):
    """Each pixel is that at `matrix` · (x, y, 1) of the picture, with coordinates from -1 to 1; uint8 [B, 3, S, S].

    torchvision's makes its grid anew in each call, for which the host would wait for a GPU.
    """
    grid = _grid(matrix, images.shape[-1], images.device).expand(len(images), -1, -1, -1)
    moved = nn_functional.grid_sample(images.float() - FILL, grid, mode="bilinear", align_corners=False)
    return (moved + FILL).round_().clamp_(0, 255).to(torch.uint8)


@functools.cache
def _grid(matrix, side: int, device: torch.device) -> torch.Tensor:
    return nn_functional.affine_grid(torch.tensor([matrix], device=device), [1, 3, side, side], align_corners=False)
