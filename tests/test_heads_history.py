"""Students of heads without their weights: equal to an unroll and to steps with stored weights, in all heads have."""

import pytest
import torch
from torch import nn

from benchmarks.measure import peak_memory
from networks.clip_model import CLIPModel, ProjectionHead, trained_parameters
from networks.loss import PairLoss
from tests.unroll import Problem, check_matching, relative_error, unroll_gradient
from utils.sets import Pairs, draw_batches, initial_similarity
from utils.student import StudentLoss, gradient, matching_gradient
from utils.student.heads import history_is_smaller, match_heads

WIDTH, WIDER, TEXT_DIM, NUM_PAIRS, BATCH_SIZE, STEPS = 7, 9, 5, 6, 3, 4
SEED = 3


def arguments(heads, loss_type="WBCE", sim_type="none", dropout=0.1, blend_alpha=0.0, width=WIDTH, dtype=torch.float64):
    """Of `match_heads`, but the last two: pictures are embeddings, and both towers have rates of their own.

    `heads` is "both"; "wide", embeddings of pictures wider than features; "text" alone; or "partly", where a layer of
    each does not train.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    image_dim = WIDER if heads == "wide" else width
    with torch.random.fork_rng():
        torch.manual_seed(0)
        of_texts = ProjectionHead(TEXT_DIM, width, dropout)
        of_images = None if heads == "text" else ProjectionHead(image_dim, width, dropout)
        model = CLIPModel(nn.Identity(), of_texts, False, of_images, PairLoss(loss_type)).to(dtype).train()
    if heads == "partly":
        model.image_projection.fc.requires_grad_(False)
        model.text_projection.projection.requires_grad_(False)
    start = {name: p.detach() + 0.05 * normal(*p.shape) for name, p in trained_parameters(model).items()}
    target = {name: value + 0.05 * normal(*value.shape) for name, value in start.items()}
    rates = (torch.tensor(rate, dtype=dtype) for rate in (0.2, 0.5))
    similarity = initial_similarity(sim_type, NUM_PAIRS, 2, generator)
    similarity = tuple(part.to(dtype) + 0.2 * normal(*part.shape) for part in similarity)
    pairs = Pairs(normal(NUM_PAIRS, image_dim), normal(NUM_PAIRS, TEXT_DIM), *rates, similarity)
    loss_fn = StudentLoss(model, alpha=3.0, blend_alpha=blend_alpha).on_embeddings()
    return loss_fn, start, target, pairs, draw_batches(NUM_PAIRS, BATCH_SIZE, STEPS, generator), SEED


# Pairwise: every value of a column meets every value of each other one, but InfoNCE, which has no soft targets.
OPTIONS = [
    ("both", "InfoNCE", "none", 0.9, 1.0, 0.0, 0.0),
    ("both", "SigLIP", "full", 0.0, 0.0, 0.0, 1.0),
    ("both", "WBCE", "lowrank", 0.9, 0.6, 0.1, 1.0),
    ("wide", "InfoNCE", "none", 0.0, 0.6, 0.1, 1.0),
    ("wide", "SigLIP", "lowrank", 0.0, 1.0, 0.0, 0.0),
    ("wide", "WBCE", "full", 0.9, 0.6, 0.0, 0.0),
    ("wide", "WBCE", "none", 0.0, 0.0, 0.0, 1.0),
    ("text", "InfoNCE", "none", 0.0, 0.0, 0.0, 0.0),
    ("text", "SigLIP", "full", 0.0, 0.0, 0.0, 0.0),
    ("text", "SigLIP", "lowrank", 0.9, 1.0, 0.1, 1.0),
    ("text", "WBCE", "lowrank", 0.0, 0.6, 0.1, 0.0),
    ("partly", "InfoNCE", "none", 0.0, 0.0, 0.1, 0.0),
    ("partly", "SigLIP", "none", 0.9, 0.6, 0.1, 0.0),
    ("partly", "WBCE", "full", 0.0, 1.0, 0.1, 1.0),
    ("partly", "WBCE", "lowrank", 0.9, 0.0, 0.0, 1.0),
]


@pytest.mark.parametrize(
    ("heads", "loss_type", "sim_type", "momentum", "adjoint_decay", "dropout", "blend_alpha"), OPTIONS
)
def test_histories_give_the_gradient_of_the_full_unroll(
    heads, loss_type, sim_type, momentum, adjoint_decay, dropout, blend_alpha
):
    """And of the steps with stored weights, whose other numbers they give too."""
    given = arguments(heads, loss_type, sim_type, dropout, blend_alpha)
    found = match_heads(*given, momentum, adjoint_decay)
    check_matching(found, *unroll_gradient(*given, momentum=momentum, adjoint_decay=adjoint_decay))
    stored = matching_gradient(*given, None, momentum, adjoint_decay)
    check_matching(found, stored.loss, stored.gradient)
    for name in ("image_loss", "text_loss", "student_losses"):
        assert torch.allclose(getattr(found, name), getattr(stored, name), rtol=1e-10, atol=0), name
    assert not any(tensor.requires_grad for tensor in (found.loss, found.student_losses, *found.gradient.tensors()))


def test_random_numbers_outside_stay_as_they_were():
    state = torch.get_rng_state()
    match_heads(*arguments("both"), 0.0, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_may_have_batches_of_any_size():
    *given, _, seed = arguments("both")
    batches = [torch.tensor(rows) for rows in ([0, 1], [5, 2, 4, 3], [1, 0, 2])]
    found = match_heads(*given, batches, seed, 0.9, 1.0)
    check_matching(found, *unroll_gradient(*given, batches, seed, momentum=0.9))


def end_of_student(loss_fn, start, pairs, batches, seed):
    """θ_T."""
    params = {name: value.clone().requires_grad_() for name, value in start.items()}
    for step, batch in enumerate(batches):
        torch.manual_seed(seed + step)
        loss = loss_fn(params, pairs.image_syn[batch], pairs.text_syn[batch])
        grads = torch.autograd.grad(loss, list(params.values()))
        rates = [pairs.syn_lr_img if name.startswith("image_") else pairs.syn_lr_txt for name in params]
        moved = zip(params.items(), rates, grads, strict=True)
        params = {name: (value - rate * grad).detach().requires_grad_() for (name, value), rate, grad in moved}
    return params


def test_single_precision_errs_little_more_than_with_stored_weights():
    """Where the student ends close to the target, and most of each distance cancels."""
    loss_fn, start, _, pairs, batches, seed = arguments("both", width=64, dtype=torch.float32)
    ends = end_of_student(loss_fn, start, pairs, batches, seed).items()
    target = {name: torch.lerp(start[name], end.detach(), 0.8) for name, end in ends}
    given = loss_fn, start, target, pairs, batches, seed
    single = match_heads(*given, 0.0, 1.0), matching_gradient(*given)
    loss_fn.model.double()
    start, target = ({name: value.double() for name, value in values.items()} for values in (start, target))
    exact = matching_gradient(loss_fn, start, target, Pairs.of(t.double() for t in pairs.tensors()), batches, seed)
    assert exact.loss < 0.2
    for name in ("image_syn", "text_syn"):
        found, stored = (relative_error(way.gradient.named()[name], exact.gradient.named()[name]) for way in single)
        assert found < 3 * stored < 1e-4, name


# ---- which way


@pytest.mark.parametrize(("rows", "smaller"), [(24, True), (25, False)])
def test_the_smaller_of_rows_and_weights_is_kept(rows, smaller):
    """A text head's two weights are 65 · 13 + 65 · 65 = 5070 numbers; a row is 65 + 13 + 65 + 65 = 208 of them."""
    model = CLIPModel(nn.Identity(), ProjectionHead(13, 65))
    loss_fn, start = StudentLoss(model), trained_parameters(model)
    batches = torch.arange(rows).split(8)
    assert history_is_smaller(loss_fn, start, batches) == smaller
    model.bf16 = True
    assert not history_is_smaller(loss_fn, start, batches)


@pytest.mark.parametrize("repeats", [1, 40])
def test_both_ways_are_taken_and_exact(repeats, monkeypatch):
    problem, taken = Problem("test_nfnet", freeze="image_encoder", image_projection=True), []
    *given, batches, seed = problem.arguments(2)
    given = *given, [batch.repeat(repeats) for batch in batches], seed
    monkeypatch.setattr(gradient, "match_heads", lambda *given: taken.append(given) or match_heads(*given))
    check_matching(matching_gradient(*given, momentum=0.9), *unroll_gradient(*given, momentum=0.9))
    assert len(taken) == (repeats == 1)


def test_no_step_keeps_a_weight():
    """Eight steps hold less than two sets of weights, where the stored ones are seven and more."""
    *given, batches, seed = arguments("both", width=1024, dtype=torch.float32)
    given = *given, batches * 2, seed
    weights = sum(value.nbytes for value in given[1].values())
    history = peak_memory(lambda: match_heads(*given, 0.0, 1.0), torch.device("cpu"))
    stored = peak_memory(lambda: matching_gradient(*given), torch.device("cpu"))
    assert history < 2 * weights < 7 * weights < stored
