"""How the pictures of learned pairs are held, and the pixels that they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PictureForm:
    """How the pictures of learned pairs are held: as pixels, or as weights over real pictures.

    Attributes:
        mean, std: normalisation of pixels, three floats each.
        pictures: [N, 3, H, W] normalised, what weights [M, N] are over, the M first pictures before the others; None
            for pixels.
        words: JPEG files of `pictures` where weights are learned, see `Mixture`; None where they stay the identity.
    """

    mean: Sequence[float]
    std: Sequence[float]
    pictures: Tensor | None = None
    words: list[Tensor] | None = None
