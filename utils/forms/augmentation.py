"""Views of pictures: cropped, moved, mirrored, in other colours, with noise; each picture draws its own.

Differentiable augmentation of learned pictures is from Zhao and Bilen, "Dataset Condensation with Differentiable
Siamese Augmentation", ICML 2021; there all pictures of a batch share what is drawn.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.transforms import channels
from utils.device import copied_to

OPERATIONS = "crop", "shift", "flip", "brightness", "contrast", "saturation", "noise"
USUAL = tuple(name for name in OPERATIONS if name != "flip")  # a flipped picture would make "left of" wrong
LEAST_AREA = 0.6  # of a crop, to that of the picture
MOST_SHIFT = 0.1  # of the picture's side
COLOUR = 0.3  # factors of colours are 1 ± this
NOISE = 0.02  # standard deviation, where pixels are 0 to 1
GREY = 0.2989, 0.587, 0.114  # weights of red, green and blue, as torchvision has them


def view(images: Tensor, operations: Collection[str], generator: torch.Generator) -> Tensor:
    """A view of each picture [M, 3, H, W] with pixels in 0 to 1; differentiable, of the same shape.

    In this order: a crop of `LEAST_AREA` to 1 of the picture's area, resized to the whole; a shift by up to
    `MOST_SHIFT` of the side in each direction; a flip of every second picture; brightness, contrast and saturation by
    factors of 1 ± `COLOUR`; noise. The first three are one bilinear sampling, which sees the picture mirrored at its
    edges. Colours are linear: nothing is clamped to 0 to 1.

    Args:
        operations: names among `OPERATIONS`, in any order.
        generator: on the CPU. What an operation draws does not depend on the others.
    """
    placed, factors = _draw(len(images), operations, generator)
    numbers = copied_to(images.device, torch.cat([placed.flatten(1), factors], dim=1).to(images.dtype))
    if not {"crop", "shift", "flip"}.isdisjoint(operations):
        grid = F.affine_grid(numbers[:, :6].view(-1, 2, 3), list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = numbers[:, 6:].T[..., None, None, None]
    if "brightness" in operations:
        images = images * brightness
    if "contrast" in operations:
        images = torch.lerp(_grey(images).mean(dim=(2, 3), keepdim=True), images, contrast)
    if "saturation" in operations:
        images = torch.lerp(_grey(images), images, saturation)
    if "noise" in operations:
        noise = NOISE * torch.randn(images.shape, generator=generator)  # drawn after all else, which stays as it is
        images = images + copied_to(images.device, noise.to(images.dtype))
    return images


def view_normalised(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], operations: Collection[str], generator: torch.Generator
) -> Tensor:
    """`view` of pixels [M, 3, H, W] that are normalised by `mean` and `std`, as the views are."""
    mean, std = (channels(tuple(values), pixels.device) for values in (mean, std))
    return (view(pixels * std + mean, operations, generator) - mean) / std


def with_views(images: Tensor, mean: Sequence[float], std: Sequence[float], views: int, seed: int) -> Iterator[Tensor]:
    """Normalised pictures [P, 3, H, W], then so many views of them by `USUAL` operations, of the same shape."""
    yield images
    generator = torch.Generator().manual_seed(seed)
    for _ in range(views):
        seen = view_normalised(images, mean, std, USUAL, generator)
        yield seen.contiguous(memory_format=torch.channels_last)


def one_of_each(shown: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Row i is that of one of the tensors [P, …], drawn for each row."""
    drawn = torch.randint(len(shown), (len(shown[0]),), generator=generator)
    drawn = copied_to(shown[0].device, drawn).view(-1, *[1] * (shown[0].ndim - 1))
    seen = shown[0]
    for number, view in enumerate(shown[1:], 1):
        seen = torch.where(drawn == number, view, seen)
    return seen


def _draw(number: int, operations: Collection[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of each picture: from where in it (x, y) of a view are taken [M, 2, 3], and the factors of its colours [M, 3].

    Coordinates go from -1 to 1. All is drawn, whether it is used or not.
    """
    area, crop_x, crop_y, shift_x, shift_y, flip, *colours = torch.rand(number, 9, generator=generator).T
    nothing = torch.zeros(number)
    side = (LEAST_AREA + (1 - LEAST_AREA) * area).sqrt() if "crop" in operations else nothing + 1
    sign = torch.where(flip < 0.5, -1.0, 1.0) if "flip" in operations else nothing + 1

    def place(crop: Tensor, shift: Tensor) -> Tensor:
        moved = 2 * MOST_SHIFT * (2 * shift - 1) if "shift" in operations else nothing
        return (1 - side) * (2 * crop - 1) + side * moved

    rows = [side * sign, nothing, place(crop_x, shift_x)], [nothing, side, place(crop_y, shift_y)]
    placed = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    return placed, 1 + COLOUR * (2 * torch.stack(colours, dim=1) - 1)


def _grey(images: Tensor) -> Tensor:
    """[M, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue
