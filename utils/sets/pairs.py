"""What is learned, and which of it each student step and each phase sees."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.device import copied_to
from utils.sets.similarity import similarity_names

BATCH_ORDERS = ("independent", "permutation")
NAMES = ("image_syn", "text_syn", "syn_lr_img", "syn_lr_txt")


@dataclass
class Pairs:
    """What is learned: M synthetic pairs, the two rates the student trains with, and soft targets if wanted.

    Attributes:
        image_syn: [M, 3, H, W] normalised pixels; or what stands for them, see `utils.forms.PictureForm`.
        text_syn: [M, D_text] text embeddings.
        syn_lr_img, syn_lr_txt: scalars, β of the image and of the text tower.
        similarity: parts of S, see `utils.sets.similarity`; empty for hard targets.
    """

    image_syn: Tensor
    text_syn: Tensor
    syn_lr_img: Tensor
    syn_lr_txt: Tensor
    similarity: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "Pairs":
        """The inverse of `tensors`."""
        image_syn, text_syn, lr_img, lr_txt, *similarity = tensors
        return cls(image_syn, text_syn, lr_img, lr_txt, tuple(similarity))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.image_syn, self.text_syn, self.syn_lr_img, self.syn_lr_txt, *self.similarity

    def named(self) -> dict[str, Tensor]:
        names = *NAMES, *similarity_names(self.similarity)
        return dict(zip(names, self.tensors(), strict=True))


def draw_batches(
    num_pairs: int, batch_size: int, steps: int, generator: torch.Generator, order: str = "independent"
) -> list[Tensor]:
    """Indices of the pairs of each student step: `steps` tensors [min(batch_size, num_pairs)].

    Args:
        order: "independent" draws each step anew (Wu et al., 2024), "permutation" walks through a random order, and
            through another one when less than a batch of it is left (LoRS and after).
    """
    if order == "independent":
        return [torch.randperm(num_pairs, generator=generator)[:batch_size] for _ in range(steps)]
    batches = []
    while len(batches) < steps:
        batches += torch.randperm(num_pairs, generator=generator).split(batch_size)[: max(1, num_pairs // batch_size)]
    return batches[:steps]


def rows_on(device: torch.device, batches: Sequence[Tensor]) -> list[Tensor]:
    """`batches`, indices on the CPU, moved to `device` in one copy that no GPU is waited for."""
    return list(copied_to(device, torch.cat(list(batches))).split([len(batch) for batch in batches]))


def phase_rows(num_pairs: int, phases: int) -> list[Tensor]:
    """Indices of each phase's pairs, as equal in number as may be.

    Phases are consecutive parts of a set, each learned from later epochs of the experts than the one before it:
    "progressive trajectory matching" (PTM-ST, ICLR 2026); there each phase is a run of its own with its own rates.
    """
    return list(torch.arange(num_pairs).tensor_split(phases))
