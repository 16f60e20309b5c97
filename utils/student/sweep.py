"""Trajectory matching: the student's unrolled steps, the matching loss and its exact gradient.

Wu et al., "Vision-Language Dataset Distillation", TMLR 2024. Notation of the comments: θ_t the student's
parameters before step t, ℓ the contrastive loss, g_t = ∇ℓ(θ_t; X_t, Y_t), β the learned rates, μ the student's
momentum, λ_t = ∂L/∂θ_t where L is the matching loss.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.errors import InputError
from networks.clip_model import IMAGE_TOWER
from utils import ranks
from utils.sets import Pairs
from utils.student.embedded import EmbeddedPictures
from utils.student.loss import ChunkedSteps, Parameters, StudentLoss, WholeSteps
from utils.student.segment import Segment, to_device


@dataclass
class Matching:
    """The outcome of one unroll, or the mean of several.

    Attributes:
        loss: L, the sum of the two normalised distances, a scalar.
        image_loss, text_loss: its two terms; 0 where that tower does not train.
        student_losses: [T], ℓ before each of the student's steps.
        gradient: ∂L/∂ every tensor of the pairs.
    """

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    student_losses: Tensor
    gradient: Pairs


def matching_loss(student: Parameters, start: Parameters, target: Parameters) -> tuple[Tensor, Tensor]:
    """‖θ̂ − θ*_target‖² / ‖θ*_start − θ*_target‖², of the image tower and of the text tower.

    A tower without parameters, or one that the expert did not move, counts 0.
    """
    losses = []
    for names in towers(student):
        if not names:
            losses.append(torch.zeros((), dtype=torch.float32, device=next(iter(student.values())).device))
            continue
        distance = sum(((student[n] - target[n]) ** 2).sum() for n in names)
        travelled = sum(((start[n] - target[n]) ** 2).sum() for n in names)
        losses.append(distance / travelled.masked_fill(travelled == 0, torch.inf))
    return losses[0], losses[1]


def matching_gradient(
    loss_fn: StudentLoss,
    start: Parameters,
    target: Parameters,
    pairs: Pairs,
    batches: Sequence[Tensor],
    seed: int,
    pair_chunk: int | None = None,
    momentum: float = 0.0,
    adjoint_decay: float = 1.0,
) -> Matching:
    """The matching loss after T = len(batches) student steps, and its exact gradient in the memory of one step.

    The steps run without a graph, keeping each θ_t. Then the sweep goes back from λ_T = ∂L/∂θ_T: at step t
    the graph of g_t is built again, and the vector-Jacobian product of g_t with −β λ_{t+1} gives the step's
    part of ∂L/∂X, ∂L/∂Y, ∂L/∂S and of λ_t = λ_{t+1} − β (∂g_t/∂θ)ᵀ λ_{t+1}; ∂L/∂β loses ⟨λ_{t+1}, g_t⟩.
    The last step's graph is kept from the way forth unless it runs in chunks. Random numbers inside the loss
    (dropout) are the same on both ways, and depend only on `seed` and t, those of an image tower in chunks also
    on the chunk.

    With momentum, v_{t+1} = μ v_t + g_t and θ_{t+1} = θ_t − β v_{t+1}. Then b_t = λ_{t+1} + μ b_{t+1} takes the
    place of λ_{t+1} in all these products, because g_t moves θ at t and all later steps; no velocity is stored.

    For a frozen image encoder see `mean_matching`.

    Ranks share the pairs of each step (of a frozen image encoder, the pictures) and return the same gradient. With an
    image tower that draws random numbers their shares are whole chunks of `pair_chunk`, so that the numbers are those
    of one process with the same `pair_chunk`; with any other tower the shares are equal and `pair_chunk` is a matter of
    each rank's memory.

    Args:
        loss_fn: the student's loss.
        start, target: the expert's parameters θ*_s and θ*_{s+R}, by name.
        pairs: the synthetic pairs, rates and soft targets; their tensors need no gradient flag.
        batches: indices into the pairs for each step, see `draw_batches`.
        seed: of the random numbers in the student's steps.
        pair_chunk: pairs whose image tower's graph is held at a time; None for all. Then a step's memory does not
            grow with its pairs, for about 1.4 times the operations (more time for small chunks).
        momentum: μ of the student's steps.
        adjoint_decay: γ in λ_t = λ_{t+1} − γ β (∂g_t/∂θ)ᵀ b_t; 1 is exact, 0 the gradient of TESLA (Cui et al., 2023).

    Raises:
        InputError: several ranks, an image tower that draws random numbers, and no `pair_chunk` below a batch.
    """
    pairs = Pairs.of(tensor.detach() for tensor in pairs.tensors())
    if loss_fn.frozen_encoder is not None and pairs.image_syn.ndim == 4:
        segment = Segment(0, start, target, batches, seed)
        return mean_matching(loss_fn, [segment], pairs, pair_chunk, momentum, adjoint_decay)
    arguments = loss_fn, list(start), pairs, batches, seed, adjoint_decay
    batch_size = max(len(batch) for batch in batches)
    unit = check_shares(loss_fn, start, pairs, batch_size, pair_chunk)
    in_chunks = unit is not None or (pair_chunk is not None and pair_chunk < -(-batch_size // ranks.count()))
    steps = ChunkedSteps(*arguments, size=pair_chunk, unit=unit or 1) if in_chunks else WholeSteps(*arguments)
    sweep = _Sweep(steps, start, momentum)
    with torch.random.fork_rng():
        student_losses, final = sweep.forth()
        image_loss, text_loss, adjoint = _end_of_unroll(final, start, target)
        del final
        gradient = Pairs.of(sweep.back(adjoint))
    return Matching(image_loss + text_loss, image_loss, text_loss, student_losses, gradient)


def mean_matching(
    loss_fn: StudentLoss,
    segments: Sequence[Segment],
    pairs: Pairs,
    pair_chunk: int | None = None,
    momentum: float = 0.0,
    adjoint_decay: float = 1.0,
) -> Matching:
    """The mean over `segments` of the matching loss, the student's losses and the gradient; see `matching_gradient`.

    Where the student's image encoder is frozen, each picture of any segment goes through it once, the steps and the
    sweeps run on its output, and one more pass, `pair_chunk` pictures at a time, takes the gradient to the pixels: then
    further segments cost little.
    """
    pairs = Pairs.of(tensor.detach() for tensor in pairs.tensors())
    how = momentum, adjoint_decay
    if loss_fn.frozen_encoder is None or pairs.image_syn.ndim != 4:
        return _mean((_matched(segment, loss_fn, pairs, pair_chunk, *how) for segment in segments), len(segments))
    used = torch.cat([batch for segment in segments for batch in segment.batches])
    pictures = EmbeddedPictures(loss_fn.frozen_encoder, pairs.image_syn, used, pair_chunk, segments[0].seed)
    embedded = replace(pairs, image_syn=pictures.embed)
    with ranks.alone():
        matching = _mean((_matched(segment, loss_fn, embedded, None, *how) for segment in segments), len(segments))
    image_syn, *others = matching.gradient.tensors()
    ranks.take_from_first(others)
    matching.gradient.image_syn = pictures.pixels_gradient(image_syn)
    return matching


def _matched(segment: Segment, loss_fn: StudentLoss, pairs: Pairs, *how) -> Matching:
    start, target = (to_device(snapshot, pairs.image_syn.device) for snapshot in (segment.start, segment.target))
    return matching_gradient(loss_fn, start, target, pairs, segment.batches, segment.seed, *how)


def _mean(matchings: Iterable[Matching], number: int) -> Matching:
    sums = None
    for matching in matchings:
        losses = matching.loss, matching.image_loss, matching.text_loss, matching.student_losses
        tensors = [*losses, *matching.gradient.tensors()]
        if sums is None:
            sums = tensors
        else:
            torch._foreach_add_(sums, tensors)
    torch._foreach_div_(sums, number)
    return Matching(*sums[:4], Pairs.of(sums[4:]))


def check_shares(loss_fn, params: Parameters, pairs: Pairs, batch_size: int, pair_chunk: int | None) -> int | None:
    """How many pairs a rank must take together: `pair_chunk` if the image tower draws random numbers, else None.

    Raises:
        InputError: see `matching_gradient`.
    """
    if ranks.count() == 1 or loss_fn.frozen_encoder is not None:
        return None
    if not loss_fn.draws_on_images(params, pairs.image_syn):
        return None
    if pair_chunk is None or pair_chunk >= batch_size:
        raise InputError(
            "the image tower draws random numbers (dropout), so ranks share whole chunks of pairs; give --pair_chunk "
            f"{-(-batch_size // ranks.count())} or less, the same with any number of ranks"
        )
    return pair_chunk


class _Sweep:
    """One unroll of the student: `forth` keeps θ_0 … θ_{T−1}, `back` consumes them.

    On a GPU they are kept in the host's memory, but for the first, which is the caller's, and the last, used next.
    """

    def __init__(self, steps: WholeSteps, start: Parameters, momentum: float):
        self.steps, self.start, self.momentum = steps, start, momentum
        self.stored: list[Parameters] = []

    def forth(self) -> tuple[Tensor, Parameters]:
        """ℓ before each step [T], and θ_T, ready for a gradient."""
        losses, params = [], _leaves(self.start)
        rates = [-rate for rate in self.steps.rates]
        last = len(self.steps.batches) - 1
        velocity = None
        for step in range(last + 1):
            loss, grads = self.steps.gradient(step, params)
            losses.append(loss)
            self.stored.append(params if step in (0, last) else _to_host(params))
            velocity = self._carried_on(velocity, grads)
            with torch.no_grad():
                moved = torch._foreach_addcmul(list(params.values()), velocity, rates)
            params = _leaves(dict(zip(params, moved, strict=True)))
        return torch.stack(losses), params

    def back(self, adjoint: Sequence[Tensor]) -> list[Tensor]:
        """∂L/∂ every tensor of the pairs from λ_T, which is overwritten."""
        adjoint, push = list(adjoint), None
        device = adjoint[0].device
        for step in reversed(range(len(self.stored))):
            stored = self.stored.pop()
            params = _leaves({name: value.to(device, non_blocking=True) for name, value in stored.items()})
            self.steps.prepare(step, params)
            self.steps.settle()
            push = self._carried_on(push, adjoint)
            with torch.enable_grad():
                self.steps.pull_back(step, params, adjoint, push)
        self.steps.finish()
        return self.steps.grads

    def _carried_on(self, carried: list[Tensor] | None, values: list[Tensor]) -> list[Tensor]:
        """values + μ · carried, in the memory of `carried`; `values` themselves without momentum."""
        if not self.momentum:
            return values
        if carried is None:
            return [value.clone() for value in values]
        torch._foreach_mul_(carried, self.momentum)
        torch._foreach_add_(carried, values)
        return carried


def _end_of_unroll(final: Parameters, start: Parameters, target: Parameters):
    """The two terms of L and λ_T."""
    with torch.enable_grad():
        image_loss, text_loss = matching_loss(final, start, target)
        loss = image_loss + text_loss
    adjoint = torch.autograd.grad(loss, list(final.values()), allow_unused=True, materialize_grads=True)
    return image_loss.detach(), text_loss.detach(), adjoint


def towers(params: Parameters) -> tuple[list[str], list[str]]:
    """The names of the image tower's parameters, and of the text tower's."""
    image = [name for name in params if name.startswith(IMAGE_TOWER)]
    return image, [name for name in params if name not in set(image)]


def _leaves(params: Parameters) -> Parameters:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def _to_host(params: Parameters) -> Parameters:
    return {name: _pinned_copy(value) if value.is_cuda else value for name, value in params.items()}


def _pinned_copy(value: Tensor) -> Tensor:
    value = value.detach()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
