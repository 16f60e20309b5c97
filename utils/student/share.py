"""Which pairs of a step's batch a rank's image tower sees, and the features of all of them on every rank."""

import torch
from torch import Tensor

from utils import ranks


class Share:
    """A rank's part of `number` pairs, in whole blocks of `unit`; in one process all of them.

    Attributes:
        rows: the pairs that this rank computes. One that has none computes the first, for nothing: its graph must have
            the others' shape.
        sizes: how many pairs each rank gives to the others.
    """

    def __init__(self, number: int, unit: int = 1):
        blocks = -(-number // unit)
        edges = [min(number, unit * part.stop) for part in (ranks.share_of(blocks, r) for r in range(ranks.count()))]
        self.sizes = [stop - start for start, stop in zip([0, *edges], edges, strict=False)]
        own = ranks.rank() if ranks.count() > 1 else 0
        self.start, self.size = edges[own] - self.sizes[own], self.sizes[own]
        self.rows = slice(self.start, self.start + self.size) if self.size else slice(0, 1)

    def gather(self, own: Tensor, known: Tensor | None = None) -> Tensor:
        """All pairs' rows from the ranks' own [len(rows), …], differentiable twice; `known`, if it was gathered before.

        What follows is computed on every rank alike, so the gradient of `own` is this rank's part of that of the whole.
        """
        return own if len(self.sizes) == 1 else _Gather.apply(own, self, known)

    def collect(self, own: Tensor) -> Tensor:
        """`gather` without a gradient."""
        return own if len(self.sizes) == 1 else ranks.gather_rows(own[: self.size], self.sizes)

    def part(self, of_all: Tensor) -> Tensor:
        """This rank's rows of something that all ranks have; 0 for a rank that computes for nothing."""
        return of_all[self.rows] if self.size else torch.zeros_like(of_all[self.rows])


class _Gather(torch.autograd.Function):
    """Own rows -> the rows of all. The transpose of `_Part`, if all ranks hold the same vector."""

    @staticmethod
    def forward(ctx, own, share, known):
        ctx.share = share
        return share.collect(own) if known is None else known.clone()

    @staticmethod
    def backward(ctx, grad):
        return _Part.apply(grad, ctx.share), None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx, of_all, share):
        ctx.share = share
        return share.part(of_all).clone()

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.share, None), None
