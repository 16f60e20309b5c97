"""Pictures as sums of levels of growing resolution, in decorrelated colours.

Learned so by linear gradient matching: Cazenavette, Torralba and Sitzmann, "Dataset Distillation for Pre-Trained
Self-Supervised Vision Models", NeurIPS 2025. Here the matrix of the colours is orthogonal, and the levels begin as
those of a picture.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pyramid:
    """Pictures [M, 3, S, S] as levels with sides of 1 to S, about twice as many each time.

    Attributes:
        side: S.
    """

    side: int

    @property
    def sides(self) -> list[int]:
        """Of the levels, from 1 to S."""
        sides = [self.side]
        while sides[0] > 1:
            sides.insert(0, -(-sides[0] // 2))
        return sides

    def hold(self, pixels: Tensor) -> Tensor:
        """Levels [M, P] of pictures: each the mean over squares of what those before it leave (a Laplacian pyramid)."""
        rest, levels = _decorrelated(pixels), []
        for side in self.sides:
            level = F.interpolate(rest, (side, side), mode="area")
            levels.append(level.flatten(1))
            rest = rest - self._enlarged(level)
        return torch.cat(levels, dim=1)

    def render(self, levels: Tensor) -> Tensor:
        """The pictures: the sum of levels [M, P], each enlarged. The inverse of `hold`, but for rounding."""
        parts = levels.split([3 * side * side for side in self.sides], dim=1)
        shaped = (part.unflatten(1, (3, side, side)) for part, side in zip(parts, self.sides, strict=True))
        return _rgb(sum(map(self._enlarged, shaped)))

    def _enlarged(self, level: Tensor) -> Tensor:
        if level.shape[-1] == self.side:
            return level
        return F.interpolate(level, (self.side, self.side), mode="bilinear", align_corners=False)


def _decorrelated(pixels: Tensor) -> Tensor:
    """[M, 3, H, W] as grey, red against blue, green against both, each of unit norm.

    After Ohta, Kanade and Sakai, "Color information for region segmentation", 1980: nearly uncorrelated in natural
    pictures. Written out: a product of matrices would be less exact on a GPU with --precision tf32.
    """
    red, green, blue = pixels.split(1, dim=1)
    colours = (red + green + blue) / 3**0.5, (red - blue) / 2**0.5, (red - 2 * green + blue) / 6**0.5
    return torch.cat(colours, dim=1)


def _rgb(colours: Tensor) -> Tensor:
    """The inverse of `_decorrelated`, whose matrix is orthogonal."""
    grey, red_blue, green = colours.split(1, dim=1)
    grey, red_blue, green = grey / 3**0.5, red_blue / 2**0.5, green / 6**0.5
    return torch.cat([grey + red_blue + green, grey - 2 * green, grey - red_blue + green], dim=1)
