"""How alike each picture and each text of a set are: soft targets S that are learned with the pairs.

Xu et al., "Low-Rank Similarity Mining for Multimodal Dataset Distillation" (LoRS), ICML 2024.
"""

import torch
from torch import Tensor

# The tensors that each kind of S is made of: [M, M]; or diagonal w [M] and two factors L, R [M, r].
PARTS = {
    "none": (),
    "full": ("similarity",),
    "lowrank": ("similarity_diagonal", "similarity_left", "similarity_right"),
}
SIM_TYPES = tuple(PARTS)


def initial_similarity(sim_type: str, num_pairs: int, rank: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The parts of an S that is the identity: w = 1, L normal, R = 0."""
    if sim_type == "none":
        return ()
    if sim_type == "full":
        return (torch.eye(num_pairs),)
    left = torch.randn(num_pairs, rank, generator=generator)
    return torch.ones(num_pairs), left, torch.zeros(num_pairs, rank)


def similarity_names(parts: tuple[Tensor, ...]) -> tuple[str, ...]:
    return next(names for names in PARTS.values() if len(names) == len(parts))


def similarity_matrix(parts: tuple[Tensor, ...], alpha: float, rows: Tensor | None = None) -> Tensor | None:
    """S = diag(w) + (α / r) L Rᵀ of all pairs or of `rows` [B]: [B, B]; None without parts."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0] if rows is None else parts[0][rows[:, None], rows]
    diagonal, left, right = parts if rows is None else (part[rows] for part in parts)
    return torch.diag(diagonal) + alpha / left.shape[1] * left @ right.T
