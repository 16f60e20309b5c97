"""What learned pictures are held as, and the pixels that they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.transforms import channels
from utils.forms.pyramid import Pyramid


@dataclass(frozen=True)
class PictureForm:
    """How the pictures of learned pairs are held: as pixels, as levels of a pyramid, or as weights over real pictures.

    Attributes:
        mean, std: normalisation of pixels, three floats each.
        pictures: [N, 3, H, W] normalised, what weights [M, N] are over, the M first pictures before the others; None
            for pixels and pyramids.
        words: JPEG files of `pictures` where weights are learned, see `Mixture`; None where they stay the identity.
        pyramid: that levels [M, P] are of; None for pixels and weights.
        limit: how far a pixel may go from `start`, in units of [0, 1]; None for as far as it goes.
        start: [M, 3, H, W] normalised, the first pictures; with `limit` alone.
    """

    mean: Sequence[float]
    std: Sequence[float]
    pictures: Tensor | None = None
    words: list[Tensor] | None = None
    pyramid: Pyramid | None = None
    limit: float | None = None
    start: Tensor | None = None

    def hold(self, pixels: Tensor) -> Tensor:
        """What is learned in the place of pixels [M, 3, H, W]; not of weights."""
        return self.pyramid.hold(pixels) if self.pyramid else pixels

    def render(self, image_syn: Tensor) -> Tensor:
        """The pixels [M, 3, H, W] that `image_syn` stands for, differentiable; pixels and weights as they are.

        With a limit R, start + R tanh((pixels − start) / R): the first pixels stay what they are, and so does the
        gradient there.
        """
        pixels = self.pyramid.render(image_syn) if self.pyramid else image_syn
        if self.limit is None:
            return pixels
        radius = self.limit / channels(tuple(self.std), pixels.device)
        return self.start + radius * torch.tanh((pixels - self.start) / radius)

    def spread(self, image_syn: Tensor) -> float:
        """What a rate of pictures is relative to: the standard deviation of pixels, 1 for weights."""
        return self.render(image_syn).std().item() if self.pictures is None else 1.0
