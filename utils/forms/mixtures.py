"""Pictures as learned mixtures of real ones, mixed after a frozen encoder: any encoder can take the weights."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.pairs import open_picture


@dataclass(frozen=True)
class Mixture:
    """Weights of M pictures over the real pictures that they are mixed from.

    Attributes:
        weights: [M, N], of picture i over the N real ones; the first M of these are what the pairs started from.
        words: N JPEG files of one size, each as uint8 [bytes].
    """

    weights: Tensor
    words: Sequence[Tensor]

    def pictures(self) -> Tensor:
        """The real pictures, uint8 [N, 3, H, W]."""
        return read_words(self.words)

    @property
    def nbytes(self) -> int:
        """Of the files, and of the weights in half precision, as a set stores them."""
        return sum(len(word) for word in self.words) + 2 * self.weights.numel()


def as_words(pictures: Tensor, quality: int = 90) -> list[Tensor]:
    """JPEG files of pictures uint8 [N, 3, H, W], of `quality` 1 to 95; see `Mixture`."""
    words = []
    for pixels in pictures.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        words.append(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
    return words


def read_words(words: Sequence[Tensor]) -> Tensor:
    """The pictures uint8 [N, 3, H, W] of JPEG files. Raises OSError, with its number, for what is none or too large."""
    pictures = []
    for number, word in enumerate(words):
        try:
            image = open_picture(io.BytesIO(word.numpy().tobytes()), among=len(words))
            pictures.append(np.asarray(image.convert("RGB")))
        except UnidentifiedImageError as error:  # whose own words name an address in memory
            raise OSError(f"picture {number} is none") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise OSError(f"picture {number}: {error}") from error
        if pictures[-1].shape != pictures[0].shape:
            raise OSError(f"picture {number} has another size than the first one")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def mix(weights: Tensor, features: Tensor) -> Tensor:
    """Mixtures [B, D] of features [N, D] by weights [B, N], each of the mean norm of the features.

    A row is a function of its own weights alone, whose scale does not matter.
    """
    mixed = weights @ features
    return mixed * (features.norm(dim=1).mean() / mixed.norm(dim=1, keepdim=True))
