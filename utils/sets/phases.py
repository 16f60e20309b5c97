"""Phases: consecutive parts of a set, each learned from later epochs of the experts than the one before it.

"Progressive trajectory matching" (PTM-ST, ICLR 2026); there each phase is a run of its own with its own rates.
"""

from torch import Tensor, arange


def phase_rows(num_pairs: int, phases: int) -> list[Tensor]:
    """Indices of each phase's pairs, as equal in number as may be."""
    return list(arange(num_pairs).tensor_split(phases))
