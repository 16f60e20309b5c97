"""Trajectory matching: the student's unrolled steps, the matching loss and its exact gradient.

Wu et al., "Vision-Language Dataset Distillation", TMLR 2024. Notation of the comments: θ_t the student's
parameters before step t, ℓ the contrastive loss, g_t = ∇ℓ(θ_t; X_t, Y_t), β the learned rates, μ the student's
momentum, λ_t = ∂L/∂θ_t where L is the matching loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.clip_model import IMAGE, TEXT
from utils.sets import Pairs
from utils.student.loss import Parameters
from utils.student.steps import WholeSteps


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


def matching_loss(
    student: Parameters, start: Parameters, target: Parameters, towers: dict[str, str]
) -> tuple[Tensor, Tensor]:
    """‖θ̂ − θ*_target‖² / ‖θ*_start − θ*_target‖², of the image tower and of the text tower.

    A tower without parameters, or one that the expert did not move, counts 0.

    Args:
        towers: of the parameters by name, see `CLIPModel.towers`. What the loss learns is of neither and does not
            count: with it sets of SigLIP are worth less (docs/notebook/field.md).
    """
    squares = {name: squared_distances(value, start[name], target[name]) for name, value in student.items()}
    return relative_distances(squares, towers)


def squared_distances(student: Tensor, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """‖student − target‖² and ‖start − target‖²."""
    return ((student - target) ** 2).sum(), ((start - target) ** 2).sum()


def relative_distances(squares: dict[str, tuple[Tensor, Tensor]], towers: dict[str, str]) -> tuple[Tensor, Tensor]:
    """`matching_loss` from the `squared_distances` of each parameter."""
    losses = []
    for tower in (IMAGE, TEXT):
        of_tower = [both for name, both in squares.items() if towers[name] == tower]
        if not of_tower:
            losses.append(torch.zeros((), dtype=torch.float32, device=next(iter(squares.values()))[0].device))
            continue
        distance, travelled = (sum(terms) for terms in zip(*of_tower, strict=True))
        losses.append(distance / travelled.masked_fill(travelled == 0, torch.inf))
    return losses[0], losses[1]


def match(
    steps: WholeSteps, start: Parameters, target: Parameters, momentum: float, keep_params: bool = False
) -> Matching:
    """The matching loss after a student's steps from θ*_s, and its exact gradient for the pairs of `steps`.

    The steps run without a graph, keeping each θ_t. Then the sweep goes back from λ_T = ∂L/∂θ_T: at step t
    the graph of g_t is built again, and the vector-Jacobian product of g_t with −β λ_{t+1} gives the step's
    part of ∂L/∂X, ∂L/∂Y, ∂L/∂S and of λ_t = λ_{t+1} − β (∂g_t/∂θ)ᵀ λ_{t+1}; ∂L/∂β loses ⟨λ_{t+1}, g_t⟩.
    Graphs of the last steps are kept from the way forth, as many as `steps` says. Random numbers inside the loss
    (dropout) are the same on both ways.

    With momentum, v_{t+1} = μ v_t + g_t and θ_{t+1} = θ_t − β v_{t+1}. Then b_t = λ_{t+1} + μ b_{t+1} takes the
    place of λ_{t+1} in all these products, because g_t moves θ at t and all later steps; no velocity is stored.
    """
    sweep = _Sweep(steps, start, momentum, keep_params)
    with torch.random.fork_rng():
        student_losses, final = sweep.forth()
        image_loss, text_loss, adjoint = _end_of_unroll(final, start, target, steps.loss_fn.towers)
        del final
        gradient = sweep.back(adjoint)
    return Matching(image_loss + text_loss, image_loss, text_loss, student_losses, gradient)


class _Sweep:
    """One unroll of the student: `forth` keeps θ_0 … θ_{T−1}, `back` consumes them.

    Unless `keep_params`, a GPU's wait in the host's memory, but for the first, which is the caller's, and those of kept
    graphs.
    """

    def __init__(self, steps: WholeSteps, start: Parameters, momentum: float, keep_params: bool):
        self.steps, self.start, self.momentum, self.keep_params = steps, start, momentum, keep_params
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
            stays = step in (0, last) or self.keep_params or self.steps.is_kept(step)
            self.stored.append(params if stays else _to_host(params))
            velocity = self._carried_on(velocity, grads)
            with torch.no_grad():
                moved = torch._foreach_addcmul(list(params.values()), velocity, rates)
            params = _leaves(dict(zip(params, moved, strict=True)))
        return torch.stack(losses), params

    def back(self, adjoint: Sequence[Tensor]) -> Pairs:
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


def _end_of_unroll(final: Parameters, start: Parameters, target: Parameters, towers: dict[str, str]):
    """The two terms of L and λ_T."""
    with torch.enable_grad():
        image_loss, text_loss = matching_loss(final, start, target, towers)
        loss = image_loss + text_loss
    adjoint = torch.autograd.grad(loss, list(final.values()), allow_unused=True, materialize_grads=True)
    return image_loss.detach(), text_loss.detach(), adjoint


def _leaves(params: Parameters) -> Parameters:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def _to_host(params: Parameters) -> Parameters:
    return {name: _pinned_copy(value) if value.is_cuda else value for name, value in params.items()}


def _pinned_copy(value: Tensor) -> Tensor:
    value = value.detach()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
