"""What each iteration draws: segments of experts' trajectories, and the mini-batches of the students on them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from data.errors import InputError
from utils.sets import draw_batches, phase_rows
from utils.student import Segment, prepare

CACHE_BYTES = 512e6  # of unpacked snapshots that stay in the host's memory


@dataclass(frozen=True)
class Draws:
    """Everything random about an iteration, as a function of the seed and the iteration's number alone.

    Attributes:
        experts: trajectories to choose from.
        num_pairs, batch_size, steps: of the student's mini-batches, see `draw_batches`.
        max_start_epoch: students start below this epoch.
        expert_epochs: from the start to the target.
        batch_order: see `draw_batches`.
        phases: of the pairs, see `phase_rows`; number p is drawn alone, its students start p epochs later.
        iterations: all together; each phase has an equal part of them.
        segments: that an iteration matches.
    """

    experts: list
    seed: int
    num_pairs: int
    batch_size: int
    steps: int
    max_start_epoch: int
    expert_epochs: int
    batch_order: str = "independent"
    phases: int = 1
    iterations: int = 1
    segments: int = 1

    def read(self, iteration: int, device: torch.device) -> list[Segment]:
        """The iteration's segments, with snapshots as `to_device` wants them.

        Raises InputError if they cannot be read.
        """
        numbers = range(iteration * self.segments, (iteration + 1) * self.segments)
        return [self._segment(number, self.phase(iteration), device) for number in numbers]

    def phase(self, iteration: int) -> int:
        """Number of the phase, from 0, that an iteration belongs to."""
        return min(iteration * self.phases // max(1, self.iterations), self.phases - 1)

    def begins_phase(self, iteration: int) -> bool:
        """Whether the phase is another one than that of the iteration before."""
        return self.phase(iteration) != self.phase(max(0, iteration - 1))

    def _segment(self, number: int, phase: int, device: torch.device) -> Segment:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        expert = torch.randint(len(self.experts), (), generator=generator).item()
        start_epoch = phase + torch.randint(self.max_start_epoch, (), generator=generator).item()
        rows = phase_rows(self.num_pairs, self.phases)[phase]
        batches = draw_batches(len(rows), self.batch_size, self.steps, generator, self.batch_order)
        step_seed = torch.randint(2**40, (), generator=generator).item()
        try:
            epochs = start_epoch, start_epoch + self.expert_epochs
            start, target = (self._snapshot(expert, epoch, device) for epoch in epochs)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"expert {self.experts[expert].path} can no longer be read ({error}); check the disk"
            ) from error
        return Segment(start_epoch, start, target, [rows[batch] for batch in batches], step_seed)

    @functools.cached_property
    def _snapshot(self) -> Callable:
        """From an expert's number, an epoch and the device to the snapshot there. Those used last stay unpacked."""
        size = sum(value.nbytes for value in self.experts[0].snapshot(0).values())
        read = functools.lru_cache(maxsize=int(CACHE_BYTES // max(1, size)))
        return read(lambda expert, epoch, device: prepare(self.experts[expert].snapshot(epoch), device))
