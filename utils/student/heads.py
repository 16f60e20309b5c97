"""Students of heads without their weights: a linear layer is its start and what the steps before gave to it.

A step's gradient for a weight W [D, D_in] is δᵀ x, with the layer's inputs x [B, D_in] and δ = ∂ℓ/∂(its outputs)
[B, D]. With n for the rows of all steps before t, c_n = 1 + μ + … + μ^(t−s−1) for those of step s, that is
W_t = W_0 − β Σ_n c_n δ_nᵀ x_n. What the loss and the matching loss need of it are products of rows:

    x W_tᵀ = x W_0ᵀ − β Σ_n c_n (x · x_n) δ_n
    ‖W_T − W*‖² = ‖W_0 − W*‖² − β Σ_n c_n δ_n · (2 (W_0 − W*) x_n − (W_0 − W_T) x_n)

So the steps are one graph of activations, without a W_t, its gradient or its λ; everything else that trains (biases,
layer norms, what the loss learns) is in it as it is. Other notation as in utils/student/sweep.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from networks.clip_model import IMAGE
from networks.loss import similarities
from utils.sets import Pairs, rows_on
from utils.student.loss import Parameters, StudentLoss
from utils.student.steps import gradients
from utils.student.sweep import Matching, relative_distances, squared_distances


def history_is_smaller(loss_fn: StudentLoss, start: Parameters, batches: Sequence[Tensor]) -> bool:
    """Whether the rows of all steps, x and δ of each layer, are fewer numbers than the weights. Not with bfloat16."""
    rows = sum(len(batch) for batch in batches)
    weights = [start[name] for name in linear_weights(loss_fn, start)]
    return not loss_fn.model.bf16 and rows * sum(sum(w.shape) for w in weights) < sum(w.numel() for w in weights)


def linear_weights(loss_fn: StudentLoss, names) -> list[str]:
    """Which of `names` are weights of linear layers."""
    linear = (name for name, module in loss_fn.model.named_modules() if isinstance(module, nn.Linear))
    return [f"{name}.weight" for name in linear if f"{name}.weight" in names]


class LinearHistory:
    """A linear layer of a student. β is `rate`, μ `momentum`, γ `adjoint_decay`, see `matching_gradient`."""

    def __init__(self, start: Tensor, rate: Tensor, momentum: float, adjoint_decay: float):
        self.start, self.rate, self.momentum, self.adjoint_decay = start, rate, momentum, adjoint_decay
        self.inputs, self.deltas = start.new_empty(0, start.shape[1]), start.new_empty(0, start.shape[0])
        self.coefficients = start.new_empty(0)

    def __call__(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """inputs W_tᵀ + bias [B, D]."""
        history = [damped(value, self.adjoint_decay) for value in (self.inputs, self.deltas, self.rate)]
        return F.linear(inputs, self.start, bias) - self._moved(inputs, *history)

    def add(self, inputs: Tensor, deltas: Tensor) -> None:
        """Takes a step with x [B, D_in] and δ [B, D]."""
        self.inputs, self.deltas = torch.cat([self.inputs, inputs]), torch.cat([self.deltas, deltas])
        new = self.coefficients.new_ones(len(inputs))
        self.coefficients = torch.cat([1 + self.momentum * self.coefficients, new])

    def squared_distances(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """‖W_t − target‖² and ‖W_0 − target‖²."""
        difference = self.start - target
        travelled = (torch.linalg.vector_norm(difference, dim=1) ** 2).sum()  # holds no matrix of squares
        moved = self._moved(self.inputs, self.inputs, self.deltas, self.rate)
        of_rows = (self.deltas * (2 * similarities(self.inputs, difference) - moved)).sum(dim=1)
        return travelled - (self.rate * self.coefficients * of_rows).sum(), travelled

    def _moved(self, x: Tensor, inputs: Tensor, deltas: Tensor, rate: Tensor) -> Tensor:
        """x (W_0 − W_t)ᵀ."""
        return similarities(x, inputs) * (rate * self.coefficients) @ deltas


def damped(value: Tensor, decay: float) -> Tensor:
    """`value`, and `decay` times its derivative."""
    return value if decay == 1 else torch.lerp(value.detach(), value, decay)


class WithHistory(TorchFunctionMode):
    """Within this context linear layers whose weight is a key of `layers` are those; `calls` has them, x and x W_tᵀ."""

    def __init__(self, layers: dict[Tensor, LinearHistory]):
        super().__init__()
        self.layers, self.calls = layers, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear or args[1] not in self.layers:
            return func(*args, **(kwargs or {}))
        inputs, weight, bias = args
        layer = self.layers[weight]
        outputs = layer(inputs, bias)
        self.calls.append((layer, inputs, outputs))
        return outputs


class HeadsStudent:
    """θ_t of a student of heads: `layers` of linear weights, `others` as they are."""

    def __init__(self, loss_fn: StudentLoss, start: Parameters, pairs: Pairs, momentum: float, adjoint_decay: float):
        self.loss_fn, self.pairs = loss_fn, pairs
        self.start = start = {name: value.detach() for name, value in start.items()}
        self.momentum, self.adjoint_decay = momentum, adjoint_decay
        rates = {n: pairs.syn_lr_img if loss_fn.towers[n] == IMAGE else pairs.syn_lr_txt for n in start}
        linear = linear_weights(loss_fn, start)
        self.layers = {n: LinearHistory(start[n], rates[n], momentum, adjoint_decay) for n in linear}
        self.others = {n: value.detach().requires_grad_() for n, value in start.items() if n not in self.layers}
        self.rates = [rates[n] for n in self.others]
        self.velocity = [torch.zeros_like(value) for value in self.others.values()]

    def step(self, rows: Tensor) -> Tensor:
        """Moves to θ_{t+1}; ℓ before it."""
        others = {n: damped(value, self.adjoint_decay) for n, value in self.others.items()}
        similarity = [self.loss_fn.targets(self.pairs.similarity, rows)] if self.pairs.similarity else []
        with WithHistory({self.start[n]: layer for n, layer in self.layers.items()}) as history:
            inputs = self.pairs.image_syn[rows], self.pairs.text_syn[rows], *similarity
            loss = self.loss_fn({**self.start, **others}, *inputs)
        outputs = [outputs for _, _, outputs in history.calls]
        deltas = gradients(loss, [*outputs, *others.values()], create_graph=True)
        for (layer, x, _), delta in zip(history.calls, deltas, strict=False):
            layer.add(x, delta)
        grads = deltas[len(outputs) :]
        self.velocity = [self.momentum * v + grad for v, grad in zip(self.velocity, grads, strict=True)]
        moved = zip(self.others.items(), self.rates, self.velocity, strict=True)
        self.others = {n: value - rate * v for (n, value), rate, v in moved}
        return loss.detach()

    def squared_distances(self, target: Parameters) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each parameter of θ_t."""
        of_layers = {n: layer.squared_distances(target[n]) for n, layer in self.layers.items()}
        return of_layers | {n: squared_distances(v, self.start[n], target[n]) for n, v in self.others.items()}


def match_heads(
    loss_fn: StudentLoss,
    start: Parameters,
    target: Parameters,
    pairs: Pairs,
    batches: Sequence[Tensor],
    seed: int,
    momentum: float,
    adjoint_decay: float,
) -> Matching:
    """`matching_gradient` for pairs whose pictures are embeddings [M, D_enc], by histories."""
    leaves = Pairs.of(tensor.detach().requires_grad_() for tensor in pairs.tensors())
    with torch.random.fork_rng(), torch.enable_grad():
        student, losses = HeadsStudent(loss_fn, start, leaves, momentum, adjoint_decay), []
        for step, rows in enumerate(rows_on(pairs.image_syn.device, batches)):
            torch.manual_seed(seed + step)
            losses.append(student.step(rows))
        of_towers = relative_distances(student.squared_distances(target), loss_fn.towers)
        loss = sum(of_towers)
        gradient = Pairs.of(gradients(loss, leaves.tensors()))
    return Matching(loss.detach(), *(of.detach() for of in of_towers), torch.stack(losses), gradient)
