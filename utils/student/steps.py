"""A student's steps: the gradient of one, and the way back through it.

Notation as in utils/student/sweep.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.clip_model import IMAGE
from utils.sets import Pairs, rows_on
from utils.student.loss import Parameters


@dataclass(frozen=True)
class Keep:
    """What stays in a device's memory from the way forth for the way back.

    Attributes:
        graphs: of the last steps, where all pairs are in memory at a time. Each takes the memory of a step, and spares
            the way back a forward and backward pass.
        params: every θ_t; else those without a kept graph wait in the host's memory.
    """

    graphs: int = 1
    params: bool = False


LEAST = Keep()


class WholeSteps:
    """Student steps with all their pairs in one graph; those of the last steps are kept from the way forth.

    Args:
        loss_fn: the student's loss.
        names: of the parameters.
        pairs: the synthetic pairs, rates and soft targets.
        batches: indices of each step's pairs.
        seed: of the random numbers; step t depends on `seed` and t alone.
        adjoint_decay: γ of `pull_back`.
        kept_graphs: how many, see `Keep`.

    Attributes:
        grads: ∂L/∂ every tensor of the pairs, filled by `pull_back`, complete after `finish`.
    """

    def __init__(
        self,
        loss_fn,
        names: Sequence[str],
        pairs: Pairs,
        batches: Sequence[Tensor],
        seed: int,
        adjoint_decay: float,
        kept_graphs: int = 1,
    ):
        self.loss_fn, self.pairs, self.seed, self.adjoint_decay = loss_fn, pairs, seed, adjoint_decay
        self.batches = rows_on(pairs.image_syn.device, batches)
        self.is_image = [loss_fn.towers[name] == IMAGE for name in names]
        self.rates = [pairs.syn_lr_img if image else pairs.syn_lr_txt for image in self.is_image]
        self.grads = Pairs.of(torch.zeros_like(tensor) for tensor in pairs.tensors())
        self.first_kept = len(batches) - kept_graphs
        self.graphs = []  # the last one is used next

    def is_kept(self, step: int) -> bool:
        """Whether the step's graph is kept on the way forth, and θ_t with it."""
        return step >= self.first_kept

    def gradient(self, step: int, params: Parameters) -> tuple[Tensor, list[Tensor]]:
        """ℓ and g_t at `params`."""
        loss, grads, leaves = self._graph(step, params, create_graph=self.is_kept(step))
        if self.is_kept(step):
            self.graphs.append((grads, leaves))
        return loss, [grad.detach() for grad in grads]

    def prepare(self, step: int, params: Parameters) -> None:
        """Builds the graph of g_t again unless it was kept, which `pull_back` uses up; λ_{t+1} is not needed for it."""
        if not self.graphs:
            self.graphs.append(self._graph(step, params, create_graph=True)[1:])

    def settle(self) -> None:
        """Completes the λ that `pull_back` was given last; here it is complete."""

    def finish(self) -> None:
        """Completes `grads`; here they are complete."""

    def pull_back(self, step: int, params: Parameters, adjoint: list[Tensor], push: list[Tensor]) -> None:
        """Adds −γ β (∂g_t/∂θ)ᵀ b to λ in place, and what step t gives to `grads`; `push` is b, which may be λ itself.

        To be called after `prepare`. λ_0 is asked of nobody: step 0 leaves λ as it is.
        """
        grads, leaves = self.graphs.pop()
        for is_image, value, grad in zip(self.is_image, push, grads, strict=True):
            rate = self.grads.syn_lr_img if is_image else self.grads.syn_lr_txt
            rate -= inner(value, grad)
        vectors = torch._foreach_mul(push, self.rates)
        torch._foreach_neg_(vectors)
        params, inputs = leaves[: len(vectors)], leaves[len(vectors) :]
        asked = self._asked(step, params)
        change = vector_jacobian(grads, [*asked, *inputs], vectors)
        theta, (images, texts, *similarity) = change[: len(asked)], change[len(asked) :]
        self._descend(adjoint, theta)
        self.grads.image_syn.index_add_(0, self._image_rows(step), images)
        self._add_texts(step, texts, similarity)

    def _asked(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """The parameters that λ_t needs the step's derivative for: all or none."""
        return params if step > 0 and self.adjoint_decay > 0 else []

    def _descend(self, adjoint: list[Tensor], theta: list[Tensor]) -> None:
        """Adds the change of λ."""
        if theta:
            torch._foreach_add_(adjoint, theta, alpha=self.adjoint_decay)

    def _image_rows(self, step: int) -> Tensor:
        """The pairs whose pictures `_graph` sees."""
        return self.batches[step]

    def _loss(self, step: int, params: Parameters, *inputs: Tensor) -> Tensor:
        return self.loss_fn(params, *inputs)

    def _add_texts(self, step: int, texts: Tensor, similarity: Sequence[Tensor]) -> None:
        self.grads.text_syn.index_add_(0, self.batches[step], texts)
        add_to(self.grads.similarity, similarity)

    def _similarity(self, requires_grad: bool) -> list[Tensor]:
        return [part.detach().requires_grad_(requires_grad) for part in self.pairs.similarity]

    def _targets(self, step: int, similarity: list[Tensor]) -> list[Tensor]:
        return [self.loss_fn.targets(similarity, self.batches[step])] if similarity else []

    def _graph(self, step: int, params: Parameters, create_graph: bool):
        """ℓ, g_t, and the leaves [θ…, X, Y, parts of S…]."""
        torch.manual_seed(self.seed + step)
        images = self.pairs.image_syn[self._image_rows(step)].requires_grad_(create_graph)
        text_embed = self.pairs.text_syn[self.batches[step]].requires_grad_(create_graph)
        similarity = self._similarity(create_graph)
        with torch.enable_grad():
            loss = self._loss(step, params, images, text_embed, *self._targets(step, similarity))
            grads = gradients(loss, list(params.values()), create_graph=create_graph)
        return loss.detach(), grads, [*params.values(), images, text_embed, *similarity]


def graph_bytes(loss_fn, params: Parameters, pairs: Pairs, batch: Tensor) -> int:
    """What the graph of a step on the pairs `batch` holds, its θ_t and g_t included, and each storage once."""
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    params = {name: value.detach().requires_grad_() for name, value in params.items()}
    steps = WholeSteps(loss_fn, list(params), pairs, [batch], seed=0, adjoint_decay=1.0)
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        steps.prepare(0, params)
    for tensor in steps.graphs[0][0]:
        note(tensor)
    return sum(storages.values())


def gradients(output: Tensor, inputs: Sequence[Tensor], vector: Tensor | None = None, create_graph: bool = False):
    return torch.autograd.grad(
        output, inputs, vector, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def vector_jacobian(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]):
    """Σ ∂⟨vector, output⟩/∂input over the outputs; those that depend on no input are left out."""
    used = [(output, vector) for output, vector in zip(outputs, vectors, strict=True) if output.requires_grad]
    outputs, vectors = zip(*used, strict=True)
    return torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, materialize_grads=True)


def inner(left: Tensor, right: Tensor) -> Tensor:
    return torch.sum(left.detach() * right.detach())


def add_to(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if into:
        torch._foreach_add_(list(into), list(values))
