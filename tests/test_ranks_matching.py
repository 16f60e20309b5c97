"""The outer gradient over two and three processes against the full unroll of one."""

import json

import pytest
import torch

import benchmarks.ranks
from benchmarks.ranks import RESULT, bytes_sent, sizes_of
from data.errors import InputError
from networks.lora import Lora
from tests.processes import run_ranks
from tests.unroll import NUM_PAIRS, Problem, check_matching, unroll_gradient
from utils import ranks
from utils.student import matching_gradient


def nfnet(**settings):
    return Problem("test_nfnet", **settings)


def vit():
    """Its image tower draws random numbers."""
    return Problem("test_vit", drop_path_rate=0.2, proj_drop_rate=0.1)


def heads():
    """Its image encoder is frozen."""
    return Problem("test_nfnet", freeze="image_encoder", image_projection=True)


ADAPTERS = {"lora": Lora(2, 4.0, "all", "norm+bias")}
# By the number of ranks: problem, steps, pairs in a step, pair_chunk, the student's further settings.
CASES = {
    2: {
        "one step": lambda: (nfnet(), 1, 3, None),
        "three steps": lambda: (nfnet(), 3, 3, None, {"momentum": 0.9, "adjoint_decay": 0.8}),
        "TESLA": lambda: (nfnet(), 2, 3, 1, {"adjoint_decay": 0.0}),
        "chunks in a rank": lambda: (nfnet(), 2, NUM_PAIRS, 1, {"momentum": 0.9}),
        "random image tower": lambda: (vit(), 2, NUM_PAIRS, 2),
        "random image tower, a chunk a pair": lambda: (vit(), 2, 3, 1, {"momentum": 0.9}),
        "adapters": lambda: (nfnet(**ADAPTERS), 2, NUM_PAIRS, None),
        "soft targets": lambda: (nfnet(loss_type="WBCE").soft("lowrank"), 2, 3, None),
        "learned scale and bias": lambda: (nfnet(loss_type="SigLIP"), 2, 3, None, {"momentum": 0.9}),
        "learned scale and bias, in chunks": lambda: (nfnet(loss_type="SigLIP"), 2, NUM_PAIRS, 1),
        "frozen text tower": lambda: (nfnet(freeze="text_projection"), 2, 3, None),
        "frozen encoder": lambda: (heads(), 3, NUM_PAIRS, None, {"momentum": 0.9}),
        "frozen encoder in chunks": lambda: (heads(), 2, 3, 1),
    },
    # One of them has no pair.
    3: {
        "whole": lambda: (nfnet(), 2, 2, None),
        "random image tower": lambda: (vit(), 2, 2, 1),
        "frozen encoder": lambda: (heads(), 2, 2, None),
    },
}


def check_all(cases):
    ranks.start()
    for name in cases:
        problem, steps, batch_size, pair_chunk, *student = CASES[ranks.count()][name]()
        student, arguments = dict(*student), problem.arguments(steps, batch_size=batch_size)
        if ranks.count() == 3:
            arguments[4][:] = arguments[4][:1] * steps  # no picture but those of one step
        before = ranks.bytes_sent()
        matching = matching_gradient(*arguments, pair_chunk, **student)
        if name == "chunks in a rank":
            planned = bytes_sent(sizes_of(problem), NUM_PAIRS, steps, 2)  # of float32
            assert ranks.bytes_sent() - before == 2 * planned
        parts = [part.sum().item() for part in matching.gradient.tensors()]
        assert ranks.gather(parts) == [parts] * ranks.count(), name  # bit by bit
        if ranks.is_first():
            frozen = problem.loss_fn.frozen_encoder is not None
            expected = unroll_gradient(*arguments, None if frozen else pair_chunk, **student)
            check_matching(matching, *expected)
            print(name)
    ranks.end()
    return 0


@pytest.mark.parametrize("count", [2, 3])
def test_gradient_over_ranks_equals_the_full_unroll(count, tmp_path):
    ended = run_ranks(tmp_path, count, check_all, list(CASES[count]))
    assert [end.code for end in ended] == [0] * count, "".join(end.out + end.err for end in ended)
    assert ended[0].out.splitlines() == list(CASES[count])


def work(argv):
    benchmarks.ranks.main(argv)
    return 0


def test_benchmark(tmp_path, capsys, monkeypatch):
    """Its ranks are started by the test."""

    def start(count, argv):
        ended = run_ranks(tmp_path, count, work, [*argv, "--worker"])
        return json.loads(ended[0].out.removeprefix(RESULT))

    monkeypatch.setattr(benchmarks.ranks, "start", start)
    small = ["--image_size", "32", "--text_dim", "8", "--pairs", "2", "--steps", "1"]
    paper = {"image_encoder": "test_nfnet", "image_size": 32, "text_dim": 8, "pairs": 4, "steps": 2}
    monkeypatch.setattr(benchmarks.ranks, "PAPER", paper)
    benchmarks.ranks.main([*small, "--ranks", "2", "--repeats", "1", "--device", "cpu", "--links", "1e9"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    row = dict(zip(rows[0], rows[2], strict=True))
    assert row["ranks"] == "2" and row["GB sent"] == row["by formula"] and float(row["peak GB a rank"]) > 0
    assert [row[0] for row in rows[5:]] == ["1, 1 GB/s", "8, 1 GB/s"]


def ask_without_chunks():
    ranks.start()
    with pytest.raises(InputError, match="give --pair_chunk 3 or less"):
        matching_gradient(*vit().arguments(2, batch_size=NUM_PAIRS))
    state = torch.get_rng_state()
    matching_gradient(*nfnet().arguments(2))
    assert torch.equal(torch.get_rng_state(), state)
    return 0


def test_a_random_image_tower_needs_chunks(tmp_path):
    ended = run_ranks(tmp_path, 2, ask_without_chunks)
    assert [end.code for end in ended] == [0, 0], ended[0].err
