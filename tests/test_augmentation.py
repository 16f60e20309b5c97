"""Views of pictures, by torchvision one picture at a time; learned pictures augmented before the students see them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

import distill
from tests.conftest import UNSCORED
from tests.programs import error_line
from tests.test_host_waits import Crossings
from tests.unroll import Problem, check_matching, unroll
from utils.forms import OPERATIONS, USUAL, view, view_normalised
from utils.forms.augmentation import COLOUR, LEAST_AREA, MOST_SHIFT, NOISE
from utils.sets import Pairs, load_synset
from utils.student import mean_matching, pulled_back


def pictures(number=4, side=12, low=0.4, high=0.6) -> Tensor:
    """In a range that no colour operation leaves: torchvision's clamp."""
    generator = torch.Generator().manual_seed(3)
    return low + (high - low) * torch.rand(number, 3, side, side, generator=generator, dtype=torch.float64)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def drawn(number: int, seed=5) -> list[list[float]]:
    """What `view` draws for each picture, all in 0 to 1."""
    return torch.rand(number, 9, generator=seeded(seed)).double().tolist()


def by_torchvision(image: Tensor, operations, numbers) -> Tensor:
    """[3, S, S] on a canvas of the picture and its mirrors, with torchvision's operations one after the other."""
    area, crop_x, crop_y, shift_x, shift_y, flip, *colours = numbers
    size, factors = image.shape[-1], [1 + COLOUR * (2 * value - 1) for value in colours]
    zoom = (LEAST_AREA + (1 - LEAST_AREA) * area) ** 0.5 if "crop" in operations else 1.0
    # How far the centre of the view lies from that of the picture, in pixels of the picture.
    centre = [(1 - zoom) * (value - 0.5) * size if "crop" in operations else 0.0 for value in (crop_x, crop_y)]
    if "shift" in operations:
        moves = [zoom * MOST_SHIFT * (2 * value - 1) * size for value in (shift_x, shift_y)]
        centre = [place + move for place, move in zip(centre, moves, strict=True)]
    canvas = F.pad(image, [size // 2], padding_mode="symmetric")
    middle = canvas.shape[-1] / 2
    moved = F.affine(
        canvas,
        angle=0.0,
        translate=[-place / zoom for place in centre],
        scale=1 / zoom,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        center=[middle, middle],
    )
    seen = F.center_crop(moved, [size, size])
    if "flip" in operations and flip < 0.5:
        seen = F.horizontal_flip(seen)
    for name, factor in zip(("brightness", "contrast", "saturation"), factors, strict=True):
        if name in operations:
            seen = getattr(F, f"adjust_{name}")(seen, factor)
    return seen


@pytest.mark.parametrize("operations", [*([name] for name in OPERATIONS[:-1]), OPERATIONS[:3], OPERATIONS[:-1]])
def test_views_are_those_of_torchvision_one_picture_at_a_time(operations):
    images = pictures()
    views = view(images, operations, seeded())
    expected = [by_torchvision(*both) for both in zip(images, [operations] * 4, drawn(4), strict=True)]
    assert not torch.allclose(views, images, atol=1e-3)
    assert torch.allclose(views, torch.stack(expected), atol=1e-6)  # its grids are in single precision


def test_a_view_of_whole_pixels_is_a_slice_of_the_mirrored_picture(monkeypatch):
    """Shifts of one pixel in twenty, to both sides."""
    images, ends = pictures(number=2, side=20), torch.full((2, 9), 0.75)
    ends[1, 3:5] = 0.25
    monkeypatch.setattr(torch, "rand", lambda *size, generator: ends)
    right, left = view(images, ["shift"], seeded())
    assert torch.allclose(right[:, :-1, :-1], images[0, :, 1:, 1:], atol=1e-12)
    assert torch.allclose(right[:, -1, :-1], images[0, :, -1, 1:], atol=1e-12)  # the edge again
    assert torch.allclose(left[:, 1:, 1:], images[1, :, :-1, :-1], atol=1e-12)
    ends[:, 5] = torch.tensor([0.2, 0.8])
    flipped, same = view(images, ["flip"], seeded())
    assert torch.allclose(flipped, images[0].flip(-1), atol=1e-12) and torch.allclose(same, images[1], atol=1e-12)


def test_noise_has_its_strength_and_depends_on_nothing_else():
    images = pictures(number=20, side=32)
    noise = view(images, ["noise"], seeded()) - images
    assert noise.std() == pytest.approx(NOISE, rel=0.02)
    assert torch.allclose(view(images, USUAL, seeded()) - view(images, USUAL[:-1], seeded()), noise)


def test_views_depend_on_the_seed_and_differ_between_pictures():
    same = pictures(number=1).expand(3, -1, -1, -1)
    views = view(same, USUAL[:-1], seeded())
    assert torch.equal(views, view(same, USUAL[:-1], seeded()))
    assert not torch.allclose(views, view(same, USUAL[:-1], seeded(6)), atol=1e-3)
    assert not torch.allclose(views[0], views[1], atol=1e-3)
    assert torch.equal(view(same, [], seeded()), same)


def test_gradient_of_a_view():
    images = pictures(number=2, side=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda seen: view(seen, OPERATIONS, seeded()), images)


def test_views_of_normalised_pixels_are_normalised_views():
    images, mean, std = pictures().float(), (0.25, 0.5, 0.75), (0.5, 0.25, 1.0)
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    views = view_normalised((images - shift) / scale, mean, std, USUAL, seeded())
    assert torch.allclose(views, (view(images, USUAL, seeded()) - shift) / scale, atol=1e-6)


def test_a_view_waits_for_no_gpu():
    images = torch.zeros(3, 3, 8, 8, device="meta", requires_grad=True)
    view_normalised(images, (0.5,) * 3, (0.5,) * 3, OPERATIONS, seeded())  # mean and std are copied once for all
    with Crossings() as crossings:
        views = view_normalised(images, (0.5,) * 3, (0.5,) * 3, OPERATIONS, seeded())
        torch.autograd.grad(views.sum(), images)
    assert crossings.seen == [("aten._to_copy.default", True)] * 2


# ---- the gradient of a student


@pytest.mark.parametrize("pair_chunk", [None, 2])
@pytest.mark.parametrize("freeze", [None, "image_encoder"])
def test_gradient_through_views_is_that_of_the_whole_unroll(freeze, pair_chunk):
    problem = Problem("test_nfnet", dropout=0.0, freeze=freeze, image_projection=bool(freeze))
    segments, learned = problem.segments(2, steps=2), problem.pairs.image_syn.requires_grad_()

    def see(images):
        return view_normalised(images, (0.5,) * 3, (0.25,) * 3, OPERATIONS, seeded())

    pixels = see(learned)
    seen = replace(problem.pairs, image_syn=pixels)
    matching = pulled_back(mean_matching(problem.loss_fn, segments, seen, pair_chunk, momentum=0.5), pixels, learned)
    leaves = Pairs.of(tensor.detach().clone().requires_grad_() for tensor in problem.pairs.tensors())
    loss_fn = Embedded(problem.loss_fn) if freeze else problem.loss_fn
    loss = 0
    for segment in segments:
        inputs = replace(leaves, image_syn=see(leaves.image_syn))
        arguments = loss_fn, segment.start, segment.target, inputs, segment.batches, segment.seed
        loss = loss + unroll(*arguments, momentum=0.5) / 2
    gradient = torch.autograd.grad(loss, leaves.tensors())
    check_matching(matching, loss.detach(), Pairs.of(gradient))


class Embedded:
    """The student's loss of pixels before a frozen encoder, by `unroll`."""

    def __init__(self, loss_fn):
        self.loss_fn = loss_fn

    def __call__(self, params, images, text_embed):
        return self.loss_fn.on_embeddings()(params, self.loss_fn.frozen_encoder(images), text_embed)


def test_nothing_is_pulled_back_where_students_see_what_is_learned():
    problem = Problem("test_nfnet")
    matching = mean_matching(problem.loss_fn, problem.segments(1, steps=1), problem.pairs)
    assert pulled_back(matching, problem.pairs.image_syn, problem.pairs.image_syn) is matching


# ---- the script


def last(folder):
    return load_synset(folder / "last.safetensors")


@pytest.mark.parametrize("more", [[], ["--ema_decay", 0.5, "--optimizer", "adam", "--lr_img", 0.1]])
def test_a_run_with_views_resumes_exactly_and_differs_from_one_without(run_distill, tmp_path, more):
    more = *more, *UNSCORED
    views = "--syn_aug", *more
    assert run_distill(tmp_path / "a", "--Iteration", 3, *views) == 0
    assert run_distill(tmp_path / "b", "--Iteration", 1, *views) == 0
    assert run_distill(tmp_path / "b", "--Iteration", 3, *views, "--resume") == 0
    assert run_distill(tmp_path / "c", "--Iteration", 3, *more) == 0
    a, b, c = (last(tmp_path / name) for name in "abc")
    assert torch.equal(a.image_syn, b.image_syn) and torch.equal(a.text_syn, b.text_syn)
    assert not torch.allclose(a.image_syn, c.image_syn, atol=1e-4)
    assert a.settings["syn_aug"] == list(USUAL) and c.settings["syn_aug"] == []


def test_operations_of_a_command_line():
    assert distill.parse_args([]).syn_aug == []
    assert distill.parse_args(["--syn_aug"]).syn_aug == list(USUAL)
    assert distill.parse_args(["--syn_aug", "noise", "flip", "noise"]).syn_aug == ["flip", "noise"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--syn_aug", "rotate"], ["rotate", "crop"]),
        (["--syn_aug", "--text_only"], ["--syn_aug", "--text_only"]),
        (["--syn_aug", "--pix_param", "mixture", "--image_trainable", "False"], ["--syn_aug", "--pix_param mixture"]),
    ],
)
def test_wrong_input(run_distill, tmp_path, capsys, more, words):
    line = error_line(capsys, run_distill, tmp_path / "x", *more)
    assert all(word in line for word in words), line
    assert not (tmp_path / "x").exists()
