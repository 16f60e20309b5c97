"""Pictures held as pixels or levels of a pyramid, with and without a limit: values, gradients, runs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import UNSCORED
from tests.programs import error_line
from tests.test_augmentation import Embedded
from tests.unroll import NUM_PAIRS, Problem, check_matching, unroll
from utils.files import open_tensors
from utils.forms import PictureForm, Pyramid
from utils.matching import PairLearner
from utils.sets import Pairs, load_synset
from utils.student import mean_matching, pulled_back

MEAN, STD = (0.25, 0.5, 0.5), (0.5, 0.25, 0.125)


def pixels(number=3, side=12):
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def form_of(start, pyramid, limit):
    return PictureForm(
        MEAN, STD, pyramid=Pyramid(start.shape[-1]) if pyramid else None, limit=limit, start=start if limit else None
    )


# ---- the pyramid


@pytest.mark.parametrize("side", [1, 7, 12, 96])
def test_a_pyramid_begins_as_the_picture(side):
    images, pyramid = pixels(side=side), Pyramid(side)
    levels = pyramid.hold(images)
    assert levels.shape == (3, sum(3 * side * side for side in pyramid.sides))
    assert torch.allclose(pyramid.render(levels), images, atol=1e-12)


def test_levels_double_in_side_and_the_first_is_the_mean():
    images, pyramid = pixels(side=12), Pyramid(12)
    assert pyramid.sides == [1, 2, 3, 6, 12]
    # Grey, red against blue, green against both: the colours of one picture's mean.
    red, green, blue = images[0].mean(dim=(1, 2)).tolist()
    expected = [(red + green + blue) / 3**0.5, (red - blue) / 2**0.5, (red - 2 * green + blue) / 6**0.5]
    assert pyramid.hold(images)[0, :3].tolist() == pytest.approx(expected)


def test_rendering_is_the_sum_of_enlarged_levels_in_orthogonal_colours():
    pyramid = Pyramid(6)
    assert pyramid.sides == [1, 2, 3, 6]
    levels = torch.randn(2, 150, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = levels.split([3, 12, 27, 108], dim=1)
    total = 0
    for part, side in zip(parts, (1, 2, 3, 6), strict=True):
        total = total + F.interpolate(part.view(2, 3, side, side), size=6, mode="bilinear")
    axes = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    axes = axes / axes.norm(dim=1, keepdim=True)
    assert torch.allclose(axes @ axes.T, torch.eye(3, dtype=torch.float64))
    assert torch.allclose(pyramid.render(levels), torch.einsum("mdhw,dc->mchw", total, axes))


# ---- the limit


@pytest.mark.parametrize("pyramid", [False, True])
def test_a_limit_keeps_the_first_pixels_and_no_pixel_goes_further(pyramid):
    start = pixels()
    form = form_of(start, pyramid, 0.1)
    held = form.hold(start)
    assert torch.allclose(form.render(held), start, atol=1e-12)
    moved = form.render(held + 100 * torch.randn(held.shape, dtype=torch.float64)) - start
    of_unit = moved.abs().amax(dim=(0, 2, 3)) * torch.tensor(STD)
    assert torch.allclose(of_unit, torch.tensor(0.1).double(), atol=1e-6)  # all have gone as far as they may
    small = torch.full_like(start, 1e-4)
    assert torch.allclose(form_of(start, False, 0.1).render(start + small), start + small, atol=1e-9)


@pytest.mark.parametrize(("pyramid", "limit"), [(False, 0.3), (True, None), (True, 0.3)])
def test_gradient_of_a_form(pyramid, limit):
    start = pixels(number=1, side=4)
    form = form_of(start, pyramid, limit)
    held = form.hold(start)
    held = (held + 0.3 * torch.randn(held.shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(form.render, held)


def test_pixels_and_weights_are_what_is_learned():
    start = pixels()
    plain, weights = PictureForm(MEAN, STD), torch.eye(3)
    assert plain.hold(start) is start and plain.render(start) is start
    mixture = PictureForm(MEAN, STD, pictures=start)
    assert mixture.render(weights) is weights and mixture.spread(weights) == 1


@pytest.mark.parametrize(("pyramid", "limit"), [(False, 0.1), (True, None), (True, 0.1)])
def test_a_rate_of_adam_is_relative_to_the_pixels(pyramid, limit):
    """Its first step has the size of its rate."""
    start = pixels().float() * 3
    form = form_of(start, pyramid, limit)
    held = form.hold(start).clone()
    pairs = Pairs(held, torch.randn(3, 4), torch.tensor(0.1), torch.tensor(0.1))
    before, spread = held.clone(), form.spread(held)
    learner = PairLearner(pairs, lr_img=0.1, lr_txt=0.1, lr_lr=0.0, optimizer="adam", spread=spread)
    learner.step(Pairs(torch.ones_like(held), torch.ones(3, 4), torch.zeros(()), torch.zeros(())))
    assert torch.allclose(before - held.detach(), 0.1 * start.std(), rtol=1e-3)


# ---- the gradient of a student


@pytest.mark.parametrize("freeze", [None, "image_encoder"])
@pytest.mark.parametrize(("pyramid", "limit"), [(False, 0.3), (True, None), (True, 0.3)])
def test_gradient_through_a_form_is_that_of_the_whole_unroll(freeze, pyramid, limit):
    problem = Problem("test_nfnet", dropout=0.0, freeze=freeze, image_projection=bool(freeze))
    form = form_of(problem.pairs.image_syn, pyramid, limit)
    held = form.hold(problem.pairs.image_syn)
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs = replace(problem.pairs, image_syn=(held + 0.1 * noise).requires_grad_())
    segments = problem.segments(2, steps=2)
    pictures = form.render(pairs.image_syn)
    assert pictures.shape == (NUM_PAIRS, 3, 32, 32)
    matching = mean_matching(problem.loss_fn, segments, replace(pairs, image_syn=pictures), 2, momentum=0.5)
    matching = pulled_back(matching, pictures, pairs.image_syn)
    leaves = Pairs.of(tensor.detach().clone().requires_grad_() for tensor in pairs.tensors())
    loss_fn = Embedded(problem.loss_fn) if freeze else problem.loss_fn
    loss = 0
    for segment in segments:
        inputs = replace(leaves, image_syn=form.render(leaves.image_syn))
        arguments = loss_fn, segment.start, segment.target, inputs, segment.batches, segment.seed
        loss = loss + unroll(*arguments, momentum=0.5) / 2
    check_matching(matching, loss.detach(), Pairs.of(torch.autograd.grad(loss, leaves.tensors())))


# ---- the script

PYRAMID, LIMIT = ("--pix_param", "pyramid"), ("--pix_limit", 0.01)
ADAM = "--optimizer", "adam", "--lr_img", 0.1, "--ema_decay", 0.5

FIT = "--lr_teacher_img", "fit", "--lr_teacher_txt", "fit"


def first_and_last(folder):
    return [load_synset(folder / f"{name}.safetensors") for name in ("iteration_000000", "last")]


@pytest.mark.parametrize("more", [PYRAMID, LIMIT, (*PYRAMID, *LIMIT, *ADAM, *FIT, "--syn_aug"), (*LIMIT, *ADAM)])
def test_a_run_begins_as_real_pictures_keeps_its_limit_and_resumes_exactly(run_distill, straight, tmp_path, more):
    assert run_distill(tmp_path / "a", "--Iteration", 3, *more, *UNSCORED) == 0
    assert run_distill(tmp_path / "b", "--Iteration", 1, *more, *UNSCORED) == 0
    assert run_distill(tmp_path / "b", "--Iteration", 3, *more, *UNSCORED, "--resume") == 0
    first, last = first_and_last(tmp_path / "a")
    other_first, resumed = first_and_last(tmp_path / "b")
    plain = load_synset(straight / "iteration_000000.safetensors").image_syn
    for synset in (first, other_first):
        assert torch.allclose(synset.image_syn, plain, atol=1e-5)
        assert torch.equal(synset.image_syn, plain) or PYRAMID[1] in more
    assert torch.equal(last.image_syn, resumed.image_syn) and torch.equal(last.text_syn, resumed.text_syn)
    way = (last.image_syn - first.image_syn).abs() * torch.tensor(last.std).view(3, 1, 1)
    assert way.max() > 1e-5
    if "--pix_limit" in more:
        assert way.max() <= 0.01 + 1e-6


def test_what_is_learned_is_what_is_averaged_and_kept(run_distill, tmp_path):
    """The state holds levels; the set holds the rendered average of them."""
    assert run_distill(tmp_path / "a", "--Iteration", 2, *PYRAMID, *LIMIT, *ADAM, *UNSCORED) == 0
    _, last = first_and_last(tmp_path / "a")
    handle, _ = open_tensors(tmp_path / "a/state.safetensors", "distillation state")
    average, levels = handle.get_tensor("average/image_syn"), handle.get_tensor("image_syn")
    assert average.shape == levels.shape == (6, 3 * sum(side * side for side in (1, 2, 4, 8, 16, 32)))
    first = load_synset(tmp_path / "a/iteration_000000.safetensors").image_syn
    form = PictureForm(last.mean, last.std, pyramid=Pyramid(32), limit=0.01, start=first)
    assert torch.allclose(form.render(average), last.image_syn, atol=1e-5)
    assert not torch.allclose(form.render(levels), last.image_syn, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--pix_limit", 0], ["--pix_limit", "above 0"]),
        ([*LIMIT, "--text_only"], ["--pix_limit", "--text_only"]),
        ([*PYRAMID, "--text_only"], ["--pix_param pyramid", "--text_only"]),
        ([*LIMIT, "--pix_param", "mixture", "--image_trainable", "False"], ["--pix_limit", "--pix_param mixture"]),
    ],
)
def test_wrong_input(run_distill, tmp_path, capsys, more, words):
    line = error_line(capsys, run_distill, tmp_path / "x", *more)
    assert all(word in line for word in words), line
    assert not (tmp_path / "x").exists()
