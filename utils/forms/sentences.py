"""Texts as sums of few sentences, summed after a text encoder: any text encoder can take the weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sentences:
    """M texts as sums of few sentences each: text i is Σ_k weights[i, k] · embedding of sentences[rows[i, k]].

    Attributes:
        sentences: those of all texts, S distinct ones.
        rows: int64 [M, K], numbers of sentences; 0 where a text has fewer than K.
        weights: [M, K], 0 there.
    """

    sentences: list[str]
    rows: Tensor
    weights: Tensor

    @classmethod
    def of(cls, texts: Sequence[Sequence[tuple[str, float]]]) -> "Sentences":
        """From the sentences of each text with their weights, which come to be in the order of their size."""
        ordered = [sorted(text, key=lambda term: -abs(term[1])) for text in texts]
        numbers = {}  # in the order in which sentences come, so that the same texts give the same file
        for sentence, _ in (term for text in ordered for term in text):
            numbers.setdefault(sentence, len(numbers))
        terms = max(map(len, ordered), default=0)
        padded = [[(numbers[s], w) for s, w in text] + [(0, 0.0)] * (terms - len(text)) for text in ordered]
        rows = torch.tensor([[row for row, _ in text] for text in padded], dtype=torch.int64)
        return cls(list(numbers), rows, torch.tensor([[weight for _, weight in text] for text in padded]))

    def texts(self) -> list[list[tuple[str, float]]]:
        """What each text is made of, the largest weight first; the inverse of `of`."""
        pairs = zip(self.rows.tolist(), self.weights.tolist(), strict=True)
        return [[(self.sentences[r], w) for r, w in zip(rows, weights, strict=True) if w] for rows, weights in pairs]

    def misfit(self, num_pairs: int) -> str | None:
        """What keeps parts that were read from being those of `num_pairs` texts."""
        sentences, rows, weights = self.sentences, self.rows, self.weights
        if not (isinstance(sentences, list) and sentences and all(isinstance(each, str) for each in sentences)):
            return "its sentences are not a list of texts"
        if not (isinstance(rows, Tensor) and isinstance(weights, Tensor) and rows.shape == weights.shape):
            return "the numbers of its sentences and their weights do not fit"
        if rows.ndim != 2 or len(rows) != num_pairs or not 0 <= rows.min() <= rows.max() < len(sentences):
            return f"its sentences are not those of {num_pairs} texts"
        return None if torch.isfinite(weights).all() else "its sentences have weights that are not finite"

    def mix(self, embeddings: Tensor) -> Tensor:
        """The texts [M, D_text] by any text encoder, from its embeddings [S, D_text] of the sentences."""
        return mix_terms(embeddings, self.rows, self.weights)


def mix_terms(embeddings: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights[i, k] · embeddings[rows[i, k]]: [M, D] of embeddings [N, D], rows [M, K] and weights [M, K]."""
    return torch.einsum("mk,mkd->md", weights, embeddings[rows])
