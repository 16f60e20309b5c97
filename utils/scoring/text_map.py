"""A linear map from one text encoder's embeddings to another's, by ridge regression on sentences that both embed.

y ≈ x W + b with the penalty λ · mean diagonal of XᵀX on W, both sides centred, in float64. So λ has no unit: it means
the same for any encoder and any number of sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import InputError

# From nothing, for encoders that are images of each other, to what leaves little but the mean.
RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1, 10**-0.5, 1.0, 10**0.5, 10.0)
HELD_OUT = 10  # one group in so many chooses λ
LEAST_GROUPS = 2 * HELD_OUT
BLOCK = 8192  # rows that are in float64 at a time


@dataclass(frozen=True)
class TextMap:
    """y = x W + b.

    Attributes:
        weight: W, float64 [D_from, D_to].
        bias: b, float64 [D_to].
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, embed: Tensor) -> Tensor:
        """[N, D_from] -> float64 [N, D_to]."""
        return embed.double() @ self.weight + self.bias


def choose_map(source: Tensor, target: Tensor, groups: Tensor, seed: int) -> tuple[TextMap, float, float]:
    """The map with the λ of `RIDGES` that explains most on held-out sentences, fitted once more on all of them.

    Args:
        source, target: the same N sentences by both encoders, [N, D_from] and [N, D_to].
        groups: int64 [N]; sentences of one group, as the captions of a picture, are held out together.
        seed: of which tenth of the groups is held out.

    Returns:
        (map, its λ, share of the held-out sentences' variance that the map fitted on the others explains).

    Raises:
        InputError: there are fewer than `LEAST_GROUPS` groups, or the embeddings do not differ or are not finite.
    """
    names, member = groups.unique(return_inverse=True)
    if len(names) < LEAST_GROUPS:
        raise InputError(
            f"a map between text encoders takes {LEAST_GROUPS} or more sentences, or pictures with their captions, "
            f"not {len(names)}"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(len(names), dtype=torch.bool)
    held_out[order[: len(names) // HELD_OUT]] = True
    tried, judged = ~held_out[member], held_out[member]
    maps = fit_maps(source[tried], target[tried], RIDGES)
    explained = [explained_variance(text_map, source[judged], target[judged]) for text_map in maps]
    best = max(range(len(RIDGES)), key=lambda i: explained[i])
    return fit_maps(source, target, RIDGES[best : best + 1])[0], RIDGES[best], explained[best]


def fit_maps(source: Tensor, target: Tensor, ridges: Sequence[float]) -> list[TextMap]:
    """A map from source [N, D_from] to target [N, D_to] for each λ. Raises InputError as `choose_map`."""
    mean_source, mean_target = _mean(source), _mean(target)
    gram = source.new_zeros(source.shape[1], source.shape[1], dtype=torch.double)  # XᵀX
    cross = source.new_zeros(source.shape[1], target.shape[1], dtype=torch.double)  # XᵀY
    for x, y in zip(source.split(BLOCK), target.split(BLOCK), strict=True):
        x = x.double() - mean_source
        gram += x.T @ x
        cross += x.T @ (y.double() - mean_target)
    scale = gram.diagonal().mean()
    if not (scale > 0 and torch.isfinite(cross).all() and torch.isfinite(scale)):
        raise InputError("a map between text encoders needs embeddings that are finite and differ")
    # One decomposition for every λ: (XᵀX + λI)⁻¹ = Q diag(1 / (s + λ)) Qᵀ.
    values, vectors = torch.linalg.eigh(gram)
    values, cross = values.clamp(min=0), vectors.T @ cross
    weights = (vectors @ (cross / (values + ridge * scale)[:, None]) for ridge in ridges)
    return [TextMap(weight, mean_target - mean_source @ weight) for weight in weights]


def explained_variance(text_map: TextMap, source: Tensor, target: Tensor) -> float:
    """1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over the rows of source [N, D_from] and target [N, D_to]; below 0 is worse than ȳ."""
    mean, missed, whole = _mean(target), 0.0, 0.0
    for x, y in zip(source.split(BLOCK), target.split(BLOCK), strict=True):
        missed += (y.double() - text_map(x)).square().sum().item()
        whole += (y.double() - mean).square().sum().item()
    return 1 - missed / whole if whole else float("-inf")


def _mean(rows: Tensor) -> Tensor:
    """The mean [D] in float64 of rows [N, D]."""
    return sum(part.double().sum(dim=0) for part in rows.split(BLOCK)) / len(rows)
