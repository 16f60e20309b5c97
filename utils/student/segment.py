"""A piece of an expert's trajectory, and the snapshots at its ends on their way to a device."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A piece of an expert's trajectory, and what the student's steps from its start are made of.

    Attributes:
        start_epoch: s.
        start, target: the expert's parameters θ*_s and θ*_{s+R}, by name.
        batches: indices into the pairs for each step, see `draw_batches`.
        seed: of the random numbers in the student's steps.
    """

    start_epoch: int
    start: dict[str, Tensor]
    target: dict[str, Tensor]
    batches: list[Tensor]
    seed: int


def prepare(snapshot: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The snapshot in the memory layout of the models, and where a GPU can fetch it without waiting."""
    snapshot = {n: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in snapshot.items()}
    return {n: v.pin_memory() for n, v in snapshot.items()} if device.type == "cuda" else snapshot


def to_device(snapshot: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in snapshot.items()}
