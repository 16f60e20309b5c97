"""Synthetic pictures before a frozen image encoder: embedded once an iteration, and the gradient back to the pixels.

Ranks share the pictures, and each gets the embeddings and the gradients of all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.sets import rows_on
from utils.student.chunks import chunk_seed
from utils.student.share import Share


class EmbeddedPictures:
    """The encoder's output for the pictures that an iteration uses.

    Args:
        encoder: [B, 3, H, W] -> [B, D_enc], each row a function of its own picture and of random numbers, if any; or
            [B, N] -> [B, D_enc] of mixtures.
        images: [M, 3, H, W], or weights [M, N].
        used: indices on the CPU of the pictures that are needed, in any order and number.
        chunk: pictures whose graph is held at a time; None for all.
        seed: of the random numbers, the same on the way back; they depend on it and on the chunk's number.

    Attributes:
        embed: [M, D_enc]; rows of pictures that are not used are 0.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor], images: Tensor, used: Tensor, chunk: int | None, seed: int):
        self.encoder, self.images, self.seed = encoder, images, seed
        (self.used,) = rows_on(images.device, [used.unique()])
        self.share = Share(len(self.used))
        rows = self.used[self.share.rows]
        size = chunk or len(rows)
        *self.chunks, last = enumerate(rows.split(size), self.share.start // size)
        with torch.no_grad():
            parts = [self._encode(number, images[part]) for number, part in self.chunks]
        self.kept = last[1], *self._graph(*last)  # of one chunk the graph is kept for the way back
        parts.append(self.kept[-1].detach())
        embed = self.share.collect(torch.cat(parts))
        self.embed = images.new_zeros(len(images), embed.shape[1]).index_copy_(0, self.used, embed)

    def pixels_gradient(self, embed_gradient: Tensor) -> Tensor:
        """∂L/∂images, of their shape, from ∂L/∂embed [M, D_enc], once."""
        gradient = torch.zeros_like(self.images)
        rows, leaves, embed = self.kept
        self.kept = None
        while True:
            gradient[rows] = torch.autograd.grad(embed, leaves, embed_gradient[rows])[0]
            del embed
            if not self.chunks:
                return self._of_all_ranks(gradient)
            number, rows = self.chunks.pop()
            leaves, embed = self._graph(number, rows)

    def _of_all_ranks(self, gradient: Tensor) -> Tensor:
        own = gradient[self.used[self.share.rows]]
        return gradient.index_copy_(0, self.used, self.share.collect(own)) if len(self.share.sizes) > 1 else gradient

    def _graph(self, number: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaves = self.images[rows].requires_grad_()
            return leaves, self._encode(number, leaves)

    def _encode(self, number: int, images: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(chunk_seed(self.seed, number))
            return self.encoder(images)
