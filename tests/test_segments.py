"""Several segments of experts' trajectories in an iteration: their draws, and the mean of their gradients."""

import pytest
import torch

from tests.unroll import Problem, check_matching, unroll_gradient
from utils.matching import Draws
from utils.sets import Pairs
from utils.student import mean_matching

NUMBER, STEPS = 3, 3


@pytest.mark.parametrize("pair_chunk", [None, 2])
@pytest.mark.parametrize("problem", [{}, {"freeze": "image_encoder", "image_projection": True}])
def test_the_mean_of_unrolls(problem, pair_chunk):
    problem = Problem("test_nfnet", **problem)
    segments = problem.segments(NUMBER, STEPS)
    unrolled = []
    for segment in segments:
        arguments = problem.loss_fn, segment.start, segment.target, problem.pairs, segment.batches, segment.seed
        unrolled.append(unroll_gradient(*arguments, momentum=0.9))
    losses, gradients = zip(*unrolled, strict=True)
    tensors = zip(*(gradient.tensors() for gradient in gradients), strict=True)
    expected = Pairs.of(torch.stack(parts).mean(0) for parts in tensors)
    matching = mean_matching(problem.loss_fn, segments, problem.pairs, pair_chunk, momentum=0.9)
    check_matching(matching, torch.stack(losses).mean(), expected)
    assert matching.student_losses.shape == (STEPS,)


@pytest.mark.parametrize("number", [1, 4])
def test_a_frozen_encoder_sees_a_picture_once_for_all_segments(number):
    problem = Problem("test_nfnet", freeze="image_encoder", image_projection=True)
    encoder, seen = problem.loss_fn.frozen_encoder, []
    problem.loss_fn.frozen_encoder = lambda images: seen.append(len(images)) or encoder(images)
    segments = problem.segments(NUMBER, STEPS) * number
    mean_matching(problem.loss_fn, segments, problem.pairs)
    assert sum(seen) == len(torch.cat([batch for segment in segments for batch in segment.batches]).unique())


class Epochs:
    """An expert whose snapshots are their numbers."""

    def snapshot(self, epoch):
        return {"w": torch.tensor([float(epoch)])}


def test_iterations_of_several_segments_draw_what_iterations_of_one_do():
    one, four = (Draws([Epochs()], 0, 10, 4, 2, 5, 3, segments=number) for number in (1, 4))
    cpu = torch.device("cpu")
    for iteration in range(3):
        drawn = four.read(iteration, cpu)
        for number, segment in enumerate(drawn):
            (alone,) = one.read(4 * iteration + number, cpu)
            assert (segment.start_epoch, segment.seed) == (alone.start_epoch, alone.seed)
            assert all(map(torch.equal, segment.batches, alone.batches))
    assert len({segment.seed for segment in drawn}) == 4


def test_snapshots_used_last_are_not_read_again(monkeypatch):
    """Two snapshots of 4 bytes stay of four; an iteration's segments are what they are without."""
    read = []

    class Counted(Epochs):
        def snapshot(self, epoch):
            read.append(epoch)
            return super().snapshot(epoch)

    def starts(cache_bytes):
        monkeypatch.setattr("utils.matching.draws.CACHE_BYTES", cache_bytes)
        read.clear()
        segments = Draws([Counted()], 0, 10, 4, 2, 3, 1, segments=40).read(0, torch.device("cpu"))
        return [(segment.start_epoch, segment.start["w"].item(), segment.target["w"].item()) for segment in segments]

    assert starts(0) == starts(8) == starts(100)
    assert sorted(read[1:]) == [0, 1, 2, 3]  # the first one is for its size
    starts(8)
    assert 4 < len(read[1:]) < 80
