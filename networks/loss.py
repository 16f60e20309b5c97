"""Contrastive losses of the features of pairs."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SHARPNESS = 10  # of the distribution that NCE makes of a row of similarities: e¹⁰ for the own pair, 1 for another


@dataclass(frozen=True)
class PairLoss:
    """A contrastive loss of B pairs as a function of their features.

    With logits Z [B, B], the similarities / τ, and soft targets S [B, B] (Xu et al., "Low-Rank Similarity Mining",
    ICML 2024), row i of image i:
    InfoNCE: the mean of the image-to-text and text-to-image cross-entropies, as in CLIP. It has no soft targets.
    NCE: the same cross-entropies against softmax(10 S), of rows one way and of columns the other; LoRS's program
        calls it KL, but for a constant and a factor B.
    NCE_LoRS: what that program calls NCE, against S as it is. A learned S can drive it to minus infinity.
    BCE: binary cross-entropy of σ(Z) with S, the mean of all.
    WBCE: the same with log(σ + 1e-6), the mean over S > 0.5 and the mean over the rest, averaged.
    SigLIP: binary cross-entropy of σ(Z) with S, the sum over a row, the mean over rows; Z has a scale and a bias that
        are learned, and no τ (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, algorithm 1).

    Attributes:
        loss_type: one of `LOSS_TYPES`.
        temperature: τ.
    """

    loss_type: str = "InfoNCE"
    temperature: float = 0.07

    @property
    def logit(self) -> dict[str, float]:
        """First values of the parameters that the loss learns, by name; none but those of `LOGIT`."""
        return LEARNED.get(self.loss_type, {})

    def __call__(self, image_features, text_features, similarity=None, logit_scale=None, logit_bias=None):
        """The loss, a scalar.

        Args:
            image_features, text_features: [B, D], L2-normalised; row i of one belongs to row i of the other.
            similarity: S; the identity if None.
            logit_scale, logit_bias: what the loss learns, scalars: with them Z = e^scale similarities + bias.
        """
        products = similarities(image_features, text_features)
        logits = products / self.temperature if logit_scale is None else products * logit_scale.exp() + logit_bias
        if similarity is None:
            similarity = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
        return _LOSSES[self.loss_type](logits, similarity)


def similarities(left, right):
    """left @ rightᵀ, [A, D] and [B, D] -> [A, B], never in tf32: it keeps ten bits, which ties what is to be ranked."""
    products = torch.backends.cuda.matmul
    allowed, products.allow_tf32 = products.allow_tf32, False
    try:
        return left @ right.T
    finally:
        products.allow_tf32 = allowed


def _info_nce(logits, _):
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _nce(logits, similarity):
    rows, columns = (torch.softmax(SHARPNESS * similarity, dim=dim) for dim in (1, 0))
    return (_cross_entropy(logits, rows) + _cross_entropy(logits.T, columns.T)) / 2


def _nce_lors(logits, similarity):
    return (_cross_entropy(logits, similarity) + _cross_entropy(logits.T, similarity.T)) / 2


def _cross_entropy(logits, targets):
    return -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()


def _bce(logits, similarity):
    return (F.softplus(logits) - similarity * logits).mean()


def _siglip(logits, similarity):
    return (F.softplus(logits) - similarity * logits).sum(dim=1).mean()


def _wbce(logits, similarity):
    probability = torch.sigmoid(logits)
    losses = -similarity * torch.log(probability + 1e-6) - (1 - similarity) * torch.log(1 - probability + 1e-6)
    alike = similarity.detach() > 0.5
    means = (torch.where(part, losses, 0).sum() / part.sum().clamp(min=1) for part in (alike, ~alike))
    return sum(means) / 2


_LOSSES = {"InfoNCE": _info_nce, "NCE": _nce, "NCE_LoRS": _nce_lors, "BCE": _bce, "WBCE": _wbce, "SigLIP": _siglip}
LOSS_TYPES = tuple(_LOSSES)
LOGIT = "logit_scale", "logit_bias"  # names of what a loss may learn
LEARNED = {"SigLIP": {"logit_scale": math.log(10), "logit_bias": -10.0}}  # first values, those of the paper
