"""Contrastive losses, as plain functions."""

import torch
import torch.nn.functional as F

SHARPNESS = 10  # of the distribution that NCE makes of a row of similarities: e¹⁰ for the own pair, 1 for another


def similarities(left, right):
    """left @ rightᵀ, [A, D] and [B, D] -> [A, B], never in tf32: it keeps ten bits, which ties what is to be ranked."""
    products = torch.backends.cuda.matmul
    allowed, products.allow_tf32 = products.allow_tf32, False
    try:
        return left @ right.T
    finally:
        products.allow_tf32 = allowed


def contrastive_loss(image_features, text_features, temperature: float):
    """Symmetric cross-entropy over the similarities of matching pairs (InfoNCE, as in CLIP).

    Args:
        image_features, text_features: [B, D], L2-normalised; row i of one belongs to row i of the other.
        temperature: τ; logits are similarities / τ.

    Returns:
        The mean of the image-to-text and text-to-image cross-entropies, a scalar.
    """
    logits_per_image = similarities(image_features, text_features) / temperature  # [B, B]
    target = torch.arange(len(logits_per_image), device=logits_per_image.device)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_image.T, target)) / 2


def pair_loss(image_features, text_features, temperature: float, loss_type: str = "InfoNCE", similarity=None):
    """One of `LOSS_TYPES`, all but the first with soft targets (Xu et al., "Low-Rank Similarity Mining", ICML 2024).

    InfoNCE is `contrastive_loss`. With logits Z [B, B] as there and targets S:
    NCE: the same cross-entropies against softmax(10 S), of rows one way and of columns the other; LoRS's program
        calls it KL, but for a constant and a factor B.
    NCE_LoRS: what that program calls NCE, against S as it is. A learned S can drive it to minus infinity.
    BCE: binary cross-entropy of σ(Z) with S, the mean of all.
    WBCE: the same with log(σ + 1e-6), the mean over S > 0.5 and the mean over the rest, averaged.

    Args:
        similarity: S [B, B], row i of image i; the identity if None. InfoNCE has none.
    """
    if loss_type == "InfoNCE":
        return contrastive_loss(image_features, text_features, temperature)
    logits = similarities(image_features, text_features) / temperature
    if similarity is None:
        similarity = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    return _SOFT_LOSSES[loss_type](logits, similarity)


def _nce(logits, similarity):
    rows, columns = (torch.softmax(SHARPNESS * similarity, dim=dim) for dim in (1, 0))
    return (_cross_entropy(logits, rows) + _cross_entropy(logits.T, columns.T)) / 2


def _nce_lors(logits, similarity):
    return (_cross_entropy(logits, similarity) + _cross_entropy(logits.T, similarity.T)) / 2


def _cross_entropy(logits, targets):
    return -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()


def _bce(logits, similarity):
    return (F.softplus(logits) - similarity * logits).mean()


def _wbce(logits, similarity):
    probability = torch.sigmoid(logits)
    losses = -similarity * torch.log(probability + 1e-6) - (1 - similarity) * torch.log(1 - probability + 1e-6)
    alike = similarity.detach() > 0.5
    means = (torch.where(part, losses, 0).sum() / part.sum().clamp(min=1) for part in (alike, ~alike))
    return sum(means) / 2


_SOFT_LOSSES = {"NCE": _nce, "NCE_LoRS": _nce_lors, "BCE": _bce, "WBCE": _wbce}
LOSS_TYPES = ("InfoNCE", *_SOFT_LOSSES)
