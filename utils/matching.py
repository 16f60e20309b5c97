"""Trajectory matching: the student's unrolled steps, the matching loss and its exact gradient.

Wu et al., "Vision-Language Dataset Distillation", TMLR 2024. Notation of the comments: θ_t the student's
parameters before step t, ℓ the contrastive loss, g_t = ∇ℓ(θ_t; X_t, Y_t), β the learned rates,
λ_t = ∂L/∂θ_t where L is the matching loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from networks.loss import contrastive_loss

IMAGE_TOWER = "image_encoder."

Parameters = dict[str, Tensor]
# (parameters, images [B, 3, H, W], text_embed [B, D_text]) -> scalar
StudentLoss = Callable[[Parameters, Tensor, Tensor], Tensor]


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


@dataclass
class Matching:
    """The outcome of one unroll.

    Attributes:
        loss: L, the sum of the two normalised distances, a scalar.
        image_loss, text_loss: its two terms; 0 where that tower does not train.
        student_losses: [T], ℓ before each of the student's steps.
        gradient: ∂L/∂(image_syn, text_syn, syn_lr_img, syn_lr_txt).
    """

    loss: Tensor
    image_loss: Tensor
    text_loss: Tensor
    student_losses: Tensor
    gradient: Pairs


def student_loss(model, temperature: float) -> StudentLoss:
    """The contrastive loss of `model` as a function of the parameters that train."""

    def loss(params: Parameters, images: Tensor, text_embed: Tensor) -> Tensor:
        image_features, text_features = functional_call(model, params, (images, text_embed))
        return contrastive_loss(image_features, text_features, temperature)

    return loss


def draw_batches(num_pairs: int, batch_size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of the pairs of each student step: `steps` tensors [min(batch_size, num_pairs)], drawn anew."""
    return [torch.randperm(num_pairs, generator=generator)[:batch_size] for _ in range(steps)]


def matching_loss(student: Parameters, start: Parameters, target: Parameters) -> tuple[Tensor, Tensor]:
    """‖θ̂ − θ*_target‖² / ‖θ*_start − θ*_target‖², of the image tower and of the text tower.

    A tower without parameters, or one that the expert did not move, counts 0.
    """
    losses = []
    for names in _towers(student):
        distance = sum(((student[n] - target[n]) ** 2).sum() for n in names)
        travelled = sum(((start[n] - target[n]) ** 2).sum() for n in names)
        moved = names and travelled > 0
        losses.append(distance / travelled if moved else torch.zeros((), dtype=torch.float32))
    return losses[0], losses[1]


def matching_gradient(
    loss_fn: StudentLoss,
    start: Parameters,
    target: Parameters,
    pairs: Pairs,
    batches: Sequence[Tensor],
    seed: int,
) -> Matching:
    """The matching loss after T = len(batches) student steps, and its exact gradient in the memory of one step.

    The steps run without a graph, keeping each θ_t. Then the sweep goes back from λ_T = ∂L/∂θ_T: at step t
    the graph of g_t is built again, and the vector-Jacobian product of g_t with −β λ_{t+1} gives the step's
    part of ∂L/∂X, ∂L/∂Y and of λ_t = λ_{t+1} − β (∂g_t/∂θ)ᵀ λ_{t+1}; ∂L/∂β loses ⟨λ_{t+1}, g_t⟩.
    The last step's graph is kept from the way forth. Random numbers inside the loss (dropout) are the same
    on both ways, and depend only on `seed` and t.

    Args:
        loss_fn: the student's loss, see `student_loss`.
        start, target: the expert's parameters θ*_s and θ*_{s+R}, by name.
        pairs: the synthetic pairs and rates; their tensors need no gradient flag.
        batches: indices into the pairs for each step, see `draw_batches`.
        seed: of the random numbers in the student's steps.
    """
    pairs = Pairs(*(tensor.detach() for tensor in pairs.tensors()))
    sweep = _Sweep(loss_fn, start, pairs, batches, seed)
    with torch.random.fork_rng():
        student_losses = sweep.forth()
        final = sweep.params.pop()
        with torch.enable_grad():
            image_loss, text_loss = matching_loss(final, start, target)
            loss = image_loss + text_loss
            adjoint = torch.autograd.grad(loss, list(final.values()), allow_unused=True, materialize_grads=True)
        gradient = sweep.back(adjoint)
    return Matching(loss.detach(), image_loss.detach(), text_loss.detach(), student_losses, gradient)


class _Sweep:
    """One unroll of the student: `forth` fills `params` with θ_0 … θ_T, `back` consumes them."""

    def __init__(self, loss_fn, start, pairs, batches, seed):
        self.loss_fn, self.pairs, self.batches, self.seed = loss_fn, pairs, batches, seed
        self.names = list(start)
        self.is_image = [name.startswith(IMAGE_TOWER) for name in self.names]
        self.params = [self._leaves(start.values())]
        self.kept_graph = None

    def _leaves(self, values) -> Parameters:
        return {n: v.detach().requires_grad_() for n, v in zip(self.names, values, strict=True)}

    def _by_tower(self, of_image, of_text):
        return [of_image if image else of_text for image in self.is_image]

    def _step_graph(self, step: int, params: Parameters, create_graph: bool):
        """ℓ and g_t at `params`, and the leaves [θ_t…, X_t, Y_t] that g_t's graph ends in."""
        torch.manual_seed(self.seed + step)
        batch = self.batches[step].to(self.pairs.image_syn.device)
        images = self.pairs.image_syn[batch].requires_grad_(create_graph)
        text_embed = self.pairs.text_syn[batch].requires_grad_(create_graph)
        with torch.enable_grad():
            loss = self.loss_fn(params, images, text_embed)
            grads = torch.autograd.grad(
                loss, list(params.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        return loss.detach(), grads, [*params.values(), images, text_embed]

    def forth(self) -> Tensor:
        losses = []
        rates = self._by_tower(-self.pairs.syn_lr_img, -self.pairs.syn_lr_txt)
        for step in range(len(self.batches)):
            params = self.params[-1]
            last = step == len(self.batches) - 1
            loss, grads, leaves = self._step_graph(step, params, create_graph=last)
            if last:
                self.kept_graph = grads, leaves
            losses.append(loss)
            moved = torch._foreach_addcmul(_detached(params.values()), _detached(grads), rates)
            self.params.append(self._leaves(moved))
        return torch.stack(losses)

    def back(self, adjoint: Sequence[Tensor]) -> Pairs:
        pairs = self.pairs
        image_grad, text_grad = torch.zeros_like(pairs.image_syn), torch.zeros_like(pairs.text_syn)
        lr_img_grad, lr_txt_grad = torch.zeros_like(pairs.syn_lr_img), torch.zeros_like(pairs.syn_lr_txt)
        adjoint = list(adjoint)  # λ_{t+1}
        for step in reversed(range(len(self.batches))):
            params = self.params.pop()
            grads, leaves = self.kept_graph or self._step_graph(step, params, create_graph=True)[1:]
            self.kept_graph = None
            inner = torch.stack([torch.sum(a * g) for a, g in zip(adjoint, _detached(grads), strict=True)])
            is_image = torch.tensor(self.is_image, device=inner.device)
            lr_img_grad -= inner[is_image].sum()
            lr_txt_grad -= inner[~is_image].sum()
            vectors = torch._foreach_mul(adjoint, self._by_tower(-pairs.syn_lr_img, -pairs.syn_lr_txt))
            *theta, images, texts = torch.autograd.grad(
                grads, leaves, grad_outputs=vectors, allow_unused=True, materialize_grads=True
            )
            torch._foreach_add_(adjoint, theta)
            batch = self.batches[step].to(image_grad.device)
            image_grad.index_add_(0, batch, images)
            text_grad.index_add_(0, batch, texts)
        return Pairs(image_grad, text_grad, lr_img_grad, lr_txt_grad)


def _detached(tensors) -> list[Tensor]:
    return [t.detach() for t in tensors]


def _towers(params: Parameters) -> tuple[list[str], list[str]]:
    image = [name for name in params if name.startswith(IMAGE_TOWER)]
    return image, [name for name in params if name not in set(image)]
