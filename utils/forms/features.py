"""Features of pairs, a row per caption, that hold a picture's part once for all its captions.

COCO's 566,747 captions with features of 2304 and 768 numbers would take 7 GB as one matrix; here they take 1 GB for
its 113,287 pictures beside the texts, which are not copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import InputError

BLOCK = 4096  # rows that are worked on at a time
LEAST_NORM = 1e-12  # what a row is divided by at least, as by `torch.nn.functional.normalize`


@dataclass(frozen=True)
class Part:
    """Some of the columns of features: row i is embed[index[i]] * scale[index[i]].

    Attributes:
        embed: [n, D]. scale: [n].
        index: int64 [N], not falling; None where there is a row of `embed` for each.
    """

    embed: Tensor
    scale: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embed if self.index is None else self.index)

    def expand(self, values: Tensor) -> Tensor:
        """Values of the rows of `embed` [n, ...] as those of the features' rows [N, ...]."""
        return values if self.index is None else values[self.index]

    def rows(self, rows) -> Tensor:
        rows = rows if self.index is None else self.index[rows]
        return self.embed[rows] * self.scale[rows][..., None]

    def total(self) -> Tensor:
        """The sum of all rows, float64 [D]: that of many in float32 would lose digits."""
        times = 1 if self.index is None else torch.bincount(self.index, minlength=len(self.embed))
        parts = zip((self.scale * times).split(BLOCK), self.embed.split(BLOCK), strict=True)
        return sum((weights @ embed).double() for weights, embed in parts)

    def sums(self, cluster: Tensor, num: int) -> Tensor:
        """The sum of each cluster's rows, see `PairFeatures.sums`, as a product with a sparse matrix."""
        index = torch.arange(len(self)) if self.index is None else self.index
        places, size = torch.stack([cluster, index]), (num, len(self.embed))
        return torch.sparse.mm(
            torch.sparse_coo_tensor(places, self.scale[index], size, check_invariants=True), self.embed
        )

    def block(self, rows: slice) -> "Part":
        """The part of these rows alone, without a copy."""
        if self.index is None:
            return Part(self.embed[rows], self.scale[rows])
        index = self.index[rows]
        some = slice(index[0].item(), index[-1].item() + 1)
        return Part(self.embed[some], self.scale[some], index - some.start)


class PairFeatures:
    """Features [N, D], the columns of all parts next to each other; see `pair_features`."""

    def __init__(self, parts: list[Part]):
        self.parts = parts

    @classmethod
    def of(cls, features: Tensor) -> "PairFeatures":
        """Those of a matrix [N, D], as it is."""
        return cls([Part(features, features.new_ones(len(features)))])

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows) -> Tensor:
        """A row [D] by its number, or rows [n, D] by numbers or a slice."""
        return torch.cat([part.rows(rows) for part in self.parts], dim=-1)

    def blocks(self) -> Iterator["PairFeatures"]:
        """The rows in order, `BLOCK` at a time, without a copy."""
        for first in range(0, len(self), BLOCK):
            yield PairFeatures([part.block(slice(first, first + BLOCK)) for part in self.parts])

    def products(self, vectors: Tensor) -> Tensor:
        """features @ vectors: [D] -> [N], or [D, K] -> [N, K]."""
        products = 0
        for part, own in zip(self.parts, vectors.split(self._widths()), strict=True):
            scale = part.scale if own.ndim == 1 else part.scale[:, None]
            products = products + part.expand(part.embed @ own * scale)
        return products

    def squared_norms(self) -> Tensor:
        """Of each row, [N]."""
        return sum(part.expand((torch.linalg.vector_norm(part.embed, dim=1) * part.scale) ** 2) for part in self.parts)

    def mean(self) -> Tensor:
        """Of all rows, [D]."""
        return (torch.cat([part.total() for part in self.parts]) / len(self)).to(self.parts[0].embed.dtype)

    def sums(self, cluster: Tensor, num: int) -> Tensor:
        """The sum of each cluster's rows [num, D]; `cluster` int64 [N]."""
        return torch.cat([part.sums(cluster, num) for part in self.parts], dim=1)

    def _widths(self) -> list[int]:
        return [part.embed.shape[1] for part in self.parts]


def pair_features(
    kind: str, image_embed: Tensor | None, text_embed: Tensor | None, row_to_image: Tensor
) -> PairFeatures:
    """Features of the pairs, one row per caption.

    Args:
        kind: "image" [N, D_img], "text" [N, D_text], or "joint" [N, D_img + D_text], both next to each other.
            Each modality is L2-normalised by itself, so all rows have one norm and both weigh the same.
        image_embed: [P, D_img], one row per picture; not needed for "text".
        text_embed: [N, D_text]; not needed for "image".
        row_to_image: [N], not falling.

    Raises:
        InputError: an encoder gave features that are not finite.
    """
    parts = []
    if kind in ("image", "joint"):
        parts.append(Part(image_embed, _one_over_norms(image_embed, "image"), row_to_image))
    if kind in ("text", "joint"):
        parts.append(Part(text_embed, _one_over_norms(text_embed, "text")))
    return PairFeatures(parts)


def _one_over_norms(embed: Tensor, name: str) -> Tensor:
    norms = torch.linalg.vector_norm(embed, dim=1)
    if not torch.isfinite(norms).all():
        raise InputError(f"the {name} encoder gives features that are not finite; use another encoder or --features")
    return 1 / norms.clamp(min=LEAST_NORM)
