"""What is learned, and which of it each student step sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Pairs:
    """What is learned: M synthetic pairs and the two rates the student trains with.

    Attributes:
        image_syn: [M, 3, H, W] normalised pixels.
        text_syn: [M, D_text] text embeddings.
        syn_lr_img, syn_lr_txt: scalars, β of the image and of the text tower.
    """

    image_syn: Tensor
    text_syn: Tensor
    syn_lr_img: Tensor
    syn_lr_txt: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.image_syn, self.text_syn, self.syn_lr_img, self.syn_lr_txt


def draw_batches(num_pairs: int, batch_size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of the pairs of each student step: `steps` tensors [min(batch_size, num_pairs)], drawn anew."""
    return [torch.randperm(num_pairs, generator=generator)[:batch_size] for _ in range(steps)]


def rows_on(device: torch.device, batches: Sequence[Tensor]) -> list[Tensor]:
    """`batches`, indices on the CPU, moved to `device` in one copy that no GPU is waited for."""
    rows = torch.cat(list(batches))
    rows = rows.pin_memory() if device.type == "cuda" else rows
    return list(rows.to(device, non_blocking=True).split([len(batch) for batch in batches]))
