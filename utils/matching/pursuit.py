"""Orthogonal matching pursuit: texts as sums of few sentences, in the place of free embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.forms import Sentences, mix_terms

NOTHING_LEFT = 1e-5  # share of a norm below which rounding alone is left of a target or of an atom


@torch.no_grad()
def pursue(targets: Tensor, atoms: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Sums of at most `terms` atoms that come near to the targets, all targets at once.

    Each step takes the atom with the largest absolute cosine with what is left of the target, and fits the weights of
    all that were taken by least squares (Pati, Rezaiifar and Krishnaprasad, Asilomar 1993). The atoms taken so far are
    held as Q R by Gram and Schmidt, twice.

    Args:
        targets: [M, D].
        atoms: [N, D].
        terms: K, at most N.

    Returns:
        (rows of `atoms` int64 [M, K], in the order in which they were taken; their weights [M, K]). A weight is 0 where
        nothing was left to take an atom for.
    """
    number, width = targets.shape
    directions = torch.nn.functional.normalize(atoms, dim=1).T.contiguous()  # [D, N]
    basis = targets.new_zeros(number, terms, width)  # Q, a row an atom
    upper = torch.eye(terms, dtype=targets.dtype, device=targets.device).repeat(number, 1, 1)  # R
    along, taken = targets.new_zeros(number, terms), []  # Qᵀ target
    left, least = targets.clone(), NOTHING_LEFT * targets.norm(dim=1)
    for k in range(terms):
        cosines = (left @ directions).abs()
        taken.append((cosines.scatter(1, torch.stack(taken, 1), -1.0) if taken else cosines).argmax(dim=1))
        atom = atoms[taken[-1]]  # [M, D]
        rest, shares = atom, targets.new_zeros(number, terms)
        for _ in range(2):
            share = torch.einsum("mkd,md->mk", basis, rest)
            rest, shares = rest - torch.einsum("mk,mkd->md", share, basis), shares + share
        norm = rest.norm(dim=1)
        used = (left.norm(dim=1) > least) & (norm > NOTHING_LEFT * atom.norm(dim=1))
        unit = used[:, None] * rest / torch.where(used, norm, 1.0)[:, None]
        upper[:, :, k] = torch.where(used[:, None], shares, upper[:, :, k])
        upper[:, k, k] = torch.where(used, norm, 1.0)
        basis[:, k] = unit
        along[:, k] = (unit * left).sum(dim=1)
        left = left - along[:, k, None] * unit
    weights = torch.linalg.solve_triangular(upper, along[:, :, None], upper=True)[:, :, 0]
    return torch.stack(taken, dim=1), weights


@dataclass(frozen=True)
class Dictionary:
    """The sentences that texts are made of.

    Attributes:
        sentences: N distinct ones.
        embeddings: theirs, [N, D_text].
        terms: how many of them a text may have.
    """

    sentences: list[str]
    embeddings: Tensor
    terms: int

    def project(self, text_syn: Tensor) -> Tensor:
        """The mixtures that stand for texts [M, D_text], of the same shape."""
        return mix_terms(self.embeddings, *pursue(text_syn, self.embeddings, self.terms))

    def describe(self, text_syn: Tensor) -> tuple[Tensor, Sentences]:
        """What `project` gives, and the sentences that it is made of."""
        rows, weights = pursue(text_syn, self.embeddings, self.terms)
        texts = [
            [(self.sentences[row], weight) for row, weight in zip(*of_text, strict=True) if weight]
            for of_text in zip(rows.tolist(), weights.tolist(), strict=True)
        ]
        return mix_terms(self.embeddings, rows, weights), Sentences.of(texts)
