"""Synthetic pictures before a frozen image encoder: embedded once an iteration, and the gradient back to the pixels.

Ranks share the pictures, and each gets the embeddings and the gradients of all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.matching.pairs import rows_on
from utils.matching.share import Share


class EmbeddedPictures:
    """The encoder's output for the pictures that an iteration uses.

    Args:
        encoder: [B, 3, H, W] -> [B, D_enc], each row a function of its own picture alone, without random numbers.
        images: [M, 3, H, W].
        used: indices on the CPU of the pictures that are needed, in any order and number.
        chunk: pictures whose graph is held at a time; None for all.

    Attributes:
        embed: [M, D_enc]; rows of pictures that are not used are 0.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor], images: Tensor, used: Tensor, chunk: int | None):
        self.encoder, self.images = encoder, images
        (self.used,) = rows_on(images.device, [used.unique()])
        self.share = Share(len(self.used))
        rows = self.used[self.share.rows]
        *self.rows, last = rows.split(chunk or len(rows))
        with torch.no_grad():
            parts = [encoder(images[part]) for part in self.rows]
        self.kept = last, *self._graph(last)  # of one chunk the graph is kept for the way back
        parts.append(self.kept[-1].detach())
        embed = self.share.collect(torch.cat(parts))
        self.embed = images.new_zeros(len(images), embed.shape[1]).index_copy_(0, self.used, embed)

    def pixels_gradient(self, embed_gradient: Tensor) -> Tensor:
        """∂L/∂images [M, 3, H, W] from ∂L/∂embed [M, D_enc], once."""
        gradient = torch.zeros_like(self.images)
        rows, leaves, embed = self.kept
        self.kept = None
        while True:
            gradient[rows] = torch.autograd.grad(embed, leaves, embed_gradient[rows])[0]
            del embed
            if not self.rows:
                return self._of_all_ranks(gradient)
            rows = self.rows.pop()
            leaves, embed = self._graph(rows)

    def _of_all_ranks(self, gradient: Tensor) -> Tensor:
        own = gradient[self.used[self.share.rows]]
        return gradient.index_copy_(0, self.used, self.share.collect(own)) if len(self.share.sizes) > 1 else gradient

    def _graph(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaves = self.images[rows].requires_grad_()
            return leaves, self.encoder(leaves)
