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
    return torch.diag(diagonal) + left @ right.T * alpha / left.shape[1]


def similarity_misfit(similarity: tuple[Tensor, ...], num_pairs: int) -> str | None:
    """What keeps the parts from being an S of `num_pairs` pairs."""
    shapes = [tuple(part.shape) for part in similarity]
    rank = shapes[-1][-1] if len(shapes) == 3 and len(shapes[-1]) == 2 else 0
    expected = {0: [], 1: [(num_pairs,) * 2], 3: [(num_pairs,), (num_pairs, rank), (num_pairs, rank)]}
    if shapes != expected.get(len(shapes)):
        return f"its similarity has the shape {' '.join(map(str, shapes))} for {num_pairs} pairs"
    if not all(part.is_floating_point() and torch.isfinite(part).all() for part in similarity):
        return "its similarity is not made of finite floats"
    return None
