"""Contrastive losses, as plain functions."""

import torch
import torch.nn.functional as F


def contrastive_loss(image_features, text_features, temperature: float):
    """Symmetric cross-entropy over the similarities of matching pairs (InfoNCE, as in CLIP).

    Args:
        image_features, text_features: [B, D], L2-normalised; row i of one belongs to row i of the other.
        temperature: τ; logits are similarities / τ.

    Returns:
        The mean of the image-to-text and text-to-image cross-entropies, a scalar.
    """
    logits_per_image = image_features @ text_features.T / temperature  # [B, B]
    target = torch.arange(len(logits_per_image), device=logits_per_image.device)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_image.T, target)) / 2
