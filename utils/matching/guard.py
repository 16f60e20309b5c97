"""What a run has seen, and what becomes of an iteration far outside it."""

import statistics

import torch
from torch import Tensor

from data.errors import InputError
from utils.sets import Pairs
from utils.student import Matching

PARTS = ("pictures", "texts", "image rate", "text rate")  # and parts of the similarity, if it is learned
FACTOR = 10  # a gradient's norm may be so many times the median of the norms before it
MEMORY = 50  # norms that are remembered
LEAST_SEEN = 5  # before so many there is no median to speak of
RATE_FACTOR = 2  # a step may at most double or halve a learned rate
SKIPS = 3  # iterations without a finite gradient in a row, at which a run ends
FAR_ASTRAY = 4  # matching loss; a student that stays put has 2, one on real pairs may well begin a little above
STILL_ASTRAY = 20  # iterations in a row with a matching loss above 2, after which it is said


class Guard:
    """Keeps one bad iteration from throwing a run away. A sane gradient passes as it is.

    A gradient of pictures, texts or a learned rate of more than `FACTOR` times the median norm of the last `MEMORY`
    iterations is cut to that median, one that is not finite to nothing, and no step changes a learned rate by more than
    `RATE_FACTOR`.

    Attributes:
        limited: gradients and rates that were cut so far.
    """

    def __init__(self):
        self.norms: list[list[float]] = []  # of `PARTS`, each at most `FACTOR` times those before
        self.limited = self.skipped_in_a_row = self.astray_in_a_row = 0

    def limit(self, matching: Matching, pairs: Pairs, iteration: int) -> tuple[Pairs, list[str]]:
        """The gradient to step with, and lines to show.

        Raises:
            InputError: the matching loss or its gradient is not finite, and was not at the two iterations before, or
                the pairs themselves are not.
        """
        lines = self._judge_loss(matching, iteration)
        gradient = matching.gradient
        if not is_finite(matching):
            self.skipped_in_a_row += 1
            pairs_are_spoilt = not all(torch.isfinite(tensor).all() for tensor in pairs.tensors())
            if self.skipped_in_a_row == SKIPS or pairs_are_spoilt:
                raise InputError(_not_finite(matching, iteration))
            nothing = [torch.zeros_like(part) for part in gradient.tensors()]
            return self._cut("is not finite and was left out", iteration, lines, nothing)
        self.skipped_in_a_row = 0
        parts, reasons = list(gradient.tensors()), []
        norms = [part.norm().item() for part in parts]
        names = *PARTS, *("similarity" for _ in gradient.similarity)
        for i, name in enumerate(names if len(self.norms) >= LEAST_SEEN else ()):
            usual = statistics.median(seen[i] for seen in self.norms)
            if norms[i] > FACTOR * usual > 0:
                reasons.append(f"{norms[i] / usual:.0f} times the usual one for the {name}")
                parts[i] = parts[i] * (usual / norms[i])  # such an adjoint has exploded: its direction tells little
                norms[i] = FACTOR * usual
        self.norms = [*self.norms, norms][-MEMORY:]
        if not reasons:
            return gradient, lines
        return self._cut(f"is {', '.join(reasons)}; it was cut", iteration, lines, parts)

    def _cut(self, what: str, iteration: int, lines: list[str], parts: list[Tensor]) -> tuple[Pairs, list[str]]:
        self.limited += 1
        if self.limited == 1:
            lines.append(
                f"warning: the gradient of iteration {iteration} {what}; Limited_Gradients counts further ones"
            )
        return Pairs.of(parts), lines

    def _judge_loss(self, matching: Matching, iteration: int) -> list[str]:
        loss, losses = matching.loss.item(), matching.student_losses.tolist()
        self.astray_in_a_row = 0 if loss <= 2 else self.astray_in_a_row + 1
        if iteration == 0 and (losses[-1] > losses[0] or loss > FAR_ASTRAY):
            return [
                f"warning: the student goes astray (its losses {losses[0]:.2f} to {losses[-1]:.2f}, matching loss "
                f"{loss:.2f}, where 2 is a student that stays put); {_ADVICE}"
            ]
        if self.astray_in_a_row == STILL_ASTRAY:
            return [
                f"warning: {STILL_ASTRAY} iterations in a row, up to {iteration}, had a matching loss above the 2 of a "
                f"student that stays put (now {loss:.2f}); the pairs learn little: {_ADVICE}"
            ]
        return []

    def limit_rate(self, before: Tensor, after: Tensor) -> bool:
        """Keeps a learned rate, changed in place from `before` to `after`, within `RATE_FACTOR`; whether it had to."""
        limited = after.clamp(before / RATE_FACTOR, before * RATE_FACTOR)
        too_far = (limited != after).any().item()
        self.limited += too_far
        after.copy_(limited)
        return too_far

    def state(self) -> dict:
        """JSON-able, for `restore`."""
        return vars(self).copy()

    def restore(self, state: dict) -> None:
        vars(self).update(state)


_ADVICE = (
    "fit or lower --lr_teacher_img and --lr_teacher_txt, lower --syn_steps, raise --student_temperature, or use "
    "--optimizer adam"
)


def is_finite(matching: Matching) -> bool:
    numbers = [matching.loss, *(gradient.sum() for gradient in matching.gradient.tensors())]
    return torch.isfinite(torch.stack(numbers)).all().item()


def _not_finite(matching: Matching, iteration: int) -> str:
    losses = " ".join(f"{loss:.2f}" for loss in matching.student_losses.tolist())
    return (
        f"matching loss {matching.loss.item():.4g} or its gradient is not finite at iteration {iteration} "
        f"(student losses {losses}); lower --lr_teacher_img, --lr_teacher_txt, --lr_lr, --lr_img, "
        "--lr_txt or --syn_steps"
    )
