"""An expert's trajectory drawn straight, parameter by parameter."""

import functools

from torch import Tensor


class Shortcut:
    """The straight line from θ*_0 to θ*_K, divided as the expert's own way is ("shortcut trajectories", PTM-ST, 2026).

    For each parameter tensor θ_e = θ*_0 + b_e (θ*_K − θ*_0), where b_e is the share of the lengths ‖θ*_{k+1} − θ*_k‖
    that lie before epoch e.

    Args:
        expert: whose snapshots of the epochs 0 … K are read once, two at a time.
        last: K.

    Attributes:
        epochs: 0 … K.
    """

    def __init__(self, expert, last: int):
        self.expert, self.path = expert, expert.path
        self.epochs = list(range(last + 1))

    def snapshot(self, epoch: int) -> dict[str, Tensor]:
        """θ_epoch by parameter name, on the CPU."""
        start, end = self.expert.snapshot(0), self.expert.snapshot(self.epochs[-1])
        return {name: value.lerp(end[name], self._shares[name][epoch]) for name, value in start.items()}

    @functools.cached_property
    def _shares(self) -> dict[str, list[float]]:
        """b_0 … b_K of each parameter; all 0 for one that does not move."""
        before = self.expert.snapshot(0)
        lengths = {name: [0.0] for name in before}
        for epoch in self.epochs[1:]:
            after = self.expert.snapshot(epoch)
            for name, value in after.items():
                lengths[name].append(lengths[name][-1] + (value - before[name]).norm().item())
            before = after
        return {name: [length / (so_far[-1] or 1.0) for length in so_far] for name, so_far in lengths.items()}
