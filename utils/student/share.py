"""Student steps over ranks: which pairs a rank's image tower sees, and the features of all of them on every rank.

Each rank computes the image tower of its share of a step's pairs, and everything behind U for all of them. Forth, a
step gathers U and sums the image tower's part of g_t; back, it gathers Jb and sums the image tower's part of λ_t while
the next graph is built. What the pixels and the image rate get is summed once at the end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils import ranks
from utils.student.loss import Parameters
from utils.student.steps import WholeSteps


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


class SharedSteps(WholeSteps):
    """Whole steps of which each rank computes a part; the numbers are those of one process.

    Args:
        unit: a rank's share of a step's pairs is of whole blocks of so many.

    Attributes:
        shares: of each step.
        features: U of each step [B, D], from the way forth.
    """

    def __init__(self, *args, unit: int = 1):
        super().__init__(*args)
        self.shares = [Share(len(batch), unit) for batch in self.batches]
        self.features = []
        self.unsettled = None

    def gradient(self, step: int, params: Parameters) -> tuple[Tensor, list[Tensor]]:
        loss, grads = super().gradient(step, params)
        if any(self.is_image):
            grads = [grad.clone() if is_image else grad for is_image, grad in zip(self.is_image, grads, strict=True)]
            ranks.add_up(self._by_tower(grads)[0])
        return loss, grads

    def settle(self) -> None:
        if self.unsettled is not None:
            self.unsettled()
        self.unsettled = None

    def finish(self) -> None:
        """Of pixels and image rate each rank has a part, all else every rank has whole."""
        ranks.add_up([self.grads.image_syn, self.grads.syn_lr_img])
        ranks.take_from_first([self.grads.text_syn, self.grads.syn_lr_txt, *self.grads.similarity])

    def _image_rows(self, step: int) -> Tensor:
        return self.batches[step][self.shares[step].rows]

    def _loss(self, step: int, params: Parameters, images: Tensor, *others: Tensor) -> Tensor:
        """ℓ of all pairs from this rank's images. The features of the way forth are kept for the way back."""
        is_back = step < len(self.features)
        own = self.loss_fn.encode_image(params, images)
        features = self.shares[step].gather(own, self.features[step] if is_back else None)
        if not is_back:
            self.features.append(features.detach())
        return self.loss_fn.of_features(params, features, *others)

    def _descend(self, adjoint: list[Tensor], theta: list[Tensor]) -> None:
        """Adds the change of λ when `settle` is called: till then it is summed."""
        if not theta:
            return
        image, _ = self._by_tower(theta)
        wait = ranks.begin_to_add_up(image) if image else None

        def add() -> None:
            if wait:
                wait()
            torch._foreach_add_(adjoint, theta, alpha=self.adjoint_decay)

        self.unsettled = add
        if ranks.count() == 1:
            self.settle()

    def _by_tower(self, values) -> tuple[list[Tensor], list[Tensor]]:
        both = list(zip(self.is_image, values, strict=True))
        return [value for image, value in both if image], [value for image, value in both if not image]

    def _merged(self, image: Sequence[Tensor], text: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `_by_tower`; nothing of nothing."""
        image, text = list(image), list(text)
        return [(image if is_image else text).pop(0) for is_image in self.is_image if image or text]
