"""The matching loss, a plain unroll of all steps as its oracle, and small problems for both, on any device."""

import contextlib
from unittest import mock

import torch

from networks.clip_model import CLIPModel, ProjectionHead, trained_parameters
from networks.image_encoder import build_image_encoder
from networks.lora import add_lora
from networks.loss import PairLoss
from utils.sets import Pairs, draw_batches, initial_similarity
from utils.student import Segment, StudentLoss, matching_gradient
from utils.student import loss as student_module
from utils.student.chunks import chunk_seed

NAMES = ("image_syn", "text_syn", "syn_lr_img", "syn_lr_txt")
TEXT_DIM, NUM_PAIRS, BATCH_SIZE = 12, 5, 3
# Two of the four stages, two of the six blocks, all of one kind each: what is compared is no other with more of them.
SHALLOW = {"test_nfnet": {"depths": (1, 1)}, "test_vit": {"depth": 2}}


def soft_targets(similarity, batch, alpha):
    """LoRS's S = diag(w) + α / r L Rᵀ, or S itself, of a batch; in a list, empty for hard targets."""
    if len(similarity) == 3:
        weights, left, right = similarity
        similarity = [torch.diag_embed(weights) + torch.einsum("ik,jk->ij", left, right) * alpha / left.size(1)]
    return [matrix[batch][:, batch] for matrix in similarity]


def loss_in_chunks(loss_fn, params, images, text_embed, targets, seed, pair_chunk):
    """The student's loss with an image tower that sees `pair_chunk` pairs at a time, each with its own dropout."""
    features = []
    for number, chunk in enumerate(images.split(pair_chunk)):
        torch.manual_seed(chunk_seed(seed, number))
        features.append(loss_fn.encode_image(params, chunk))
    torch.manual_seed(seed)
    return loss_fn.of_features(params, torch.cat(features), text_embed, *targets)


def unroll(loss_fn, start, target, pairs, batches, seed, pair_chunk=None, momentum=0.0, adjoint_decay=1.0):
    """The oracle: every step's graph is kept. Returns the matching loss, a function of pairs' tensors.

    A loss of γ θ + (1 − γ) θ held fixed has the same gradient, and γ times its derivative.
    """
    image_syn, text_syn, lr_img, lr_txt, *similarity = pairs.tensors()
    params = {name: value.detach().requires_grad_() for name, value in start.items()}
    velocity = {name: torch.zeros_like(value) for name, value in start.items()}
    for step, batch in enumerate(batches):
        theta = params
        params = {n: adjoint_decay * value + (1 - adjoint_decay) * value.detach() for n, value in theta.items()}
        torch.manual_seed(seed + step)
        inputs = image_syn[batch], text_syn[batch]
        targets = soft_targets(similarity, batch, getattr(loss_fn, "alpha", 1.0))
        if pair_chunk is None or pair_chunk >= len(batch):
            loss = loss_fn(params, *inputs, *targets)
        else:
            loss = loss_in_chunks(loss_fn, params, *inputs, targets, seed + step, pair_chunk)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        velocity = {n: momentum * v + grad for (n, v), grad in zip(velocity.items(), grads, strict=True)}
        params = {
            name: value - (lr_img if name.startswith("image_") else lr_txt) * velocity[name]
            for name, value in theta.items()
        }
    total = 0
    for tower in ("image_", "text_"):  # neither is a learned scale or bias
        names = [name for name in start if name.startswith(tower)]
        if names:
            distance = sum((params[n] - target[n]).pow(2).sum() for n in names)
            total = total + distance / sum((start[n] - target[n]).pow(2).sum() for n in names)
    return total


def unroll_gradient(loss_fn, start, target, pairs, batches, seed, pair_chunk=None, **student):
    """By torch's own derivatives. A rate that no parameter learns with has no gradient: 0."""
    with torch.random.fork_rng(), mock.patch.object(student_module, "WrittenOut", contextlib.nullcontext):
        leaves = Pairs.of(tensor.detach().clone().requires_grad_() for tensor in pairs.tensors())
        loss = unroll(loss_fn, start, target, leaves, batches, seed, pair_chunk, **student)
        gradient = torch.autograd.grad(loss, leaves.tensors(), allow_unused=True, materialize_grads=True)
        return loss.detach(), Pairs.of(gradient)


def relative_error(value, expected):
    assert expected.norm() > 0
    return ((value - expected).norm() / expected.norm()).item()


class Problem:
    """A student in float64 with everything `matching_gradient` takes; the same numbers on every device."""

    def __init__(
        self,
        encoder,
        dropout=0.1,
        freeze=None,
        lora=None,
        image_projection=False,
        device="cpu",
        loss_type="InfoNCE",
        **kwargs,
    ):
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            image_encoder = build_image_encoder(encoder, 32, False, kwargs={**SHALLOW.get(encoder, {}), **kwargs})
            width = image_encoder.width
            of_images = ProjectionHead(width, width, dropout) if image_projection else None
            towers = image_encoder, ProjectionHead(TEXT_DIM, width, dropout)
            self.model = CLIPModel(*towers, image_projection=of_images, pair_loss=PairLoss(loss_type))
            if lora:
                add_lora(image_encoder, lora)
        if freeze:
            getattr(self.model, freeze).requires_grad_(False)
        self.model.to(device).double().train()
        self.loss_fn = StudentLoss(self.model)

        def normal(shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

        # Moved from the initialisation, where some gains are exactly zero.
        parameters = trained_parameters(self.model).items()
        self.start = {name: p.detach() + 0.05 * normal(p.shape) for name, p in parameters}
        self.target = {name: value + 0.02 * normal(value.shape) for name, value in self.start.items()}
        rates = (torch.tensor(rate, dtype=torch.float64, device=device) for rate in (0.02, 0.05))
        self.pairs = Pairs(normal((NUM_PAIRS, 3, 32, 32)), normal((NUM_PAIRS, TEXT_DIM)), *rates)

    def soft(self, sim_type):
        """The same student with soft targets that are no longer the identity."""
        self.loss_fn = StudentLoss(self.model, alpha=3.0)
        generator = torch.Generator().manual_seed(4)
        parts = initial_similarity(sim_type, NUM_PAIRS, 2, generator)
        moves = (torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in parts)
        device = self.pairs.image_syn.device
        self.pairs.similarity = tuple((p + 0.2 * move).to(device) for p, move in zip(parts, moves, strict=True))
        return self

    def single(self):
        """The same student in single precision, as the scripts run it."""
        self.model.float().to(memory_format=torch.channels_last)
        self.start, self.target = ({n: v.float() for n, v in values.items()} for values in (self.start, self.target))
        self.pairs = Pairs(*(tensor.float() for tensor in self.pairs.tensors()))
        self.pairs.image_syn = self.pairs.image_syn.to(memory_format=torch.channels_last)
        return self

    def arguments(self, steps, seed=7, batch_size=BATCH_SIZE):
        batches = draw_batches(NUM_PAIRS, batch_size, steps, torch.Generator().manual_seed(3))
        return self.loss_fn, self.start, self.target, self.pairs, batches, seed

    def segments(self, number, steps):
        """Each has its own target, batches and random numbers."""
        generator = torch.Generator().manual_seed(5)
        drawn = [draw_batches(NUM_PAIRS, BATCH_SIZE, steps, generator) for _ in range(number)]
        targets = [{name: value + 0.01 * i for name, value in self.target.items()} for i in range(number)]
        return [Segment(i, self.start, targets[i], drawn[i], seed=i) for i in range(number)]


def check_chunks(arguments, pair_chunk, expected=None, **student):
    """Against the unroll whose image tower draws its random numbers in the same chunks."""
    loss, expected = expected or unroll_gradient(*arguments, pair_chunk, **student)
    check_matching(matching_gradient(*arguments, pair_chunk, **student), loss, expected)


def check_matching(matching, loss, expected):
    assert relative_error(matching.loss, loss) < 1e-10
    for name, value in matching.gradient.named().items():
        exact = expected.named()[name]
        assert (value - exact).norm() <= 1e-10 * exact.norm(), name
