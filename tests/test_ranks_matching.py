"""The outer gradient over two and three processes against the full unroll of one."""

import json

import pytest
import torch

import benchmarks.ranks
from benchmarks.ranks import RESULT, bytes_sent, sizes_of
from data.errors import InputError
from networks.lora import Lora
from tests.processes import run_ranks
from tests.unroll import NUM_PAIRS, Problem, check_chunks, unroll_gradient
from utils import ranks
from utils.matching import StudentLoss, matching_gradient
from utils.similarity import initial_similarity


def nfnet(**settings):
    return Problem("test_nfnet", **settings)


def vit():
    """Its image tower draws random numbers."""
    return Problem("test_vit", drop_path_rate=0.2, proj_drop_rate=0.1)


def soft():
    problem = Problem("test_nfnet")
    problem.loss_fn = StudentLoss(problem.model, 0.07, "WBCE", alpha=3.0)
    parts = initial_similarity("lowrank", NUM_PAIRS, 2, torch.Generator().manual_seed(4))
    problem.pairs.similarity = tuple(part.double() + 0.1 for part in parts)
    return problem


def heads():
    """Its image encoder is frozen."""
    return Problem("test_nfnet", freeze="image_encoder", image_projection=True)


ADAPTERS = {"lora": Lora(2, 4.0, "all", "norm+bias")}
# By the number of ranks: problem, steps, pairs in a step, pair_chunk, the student's further settings.
CASES = {
    2: {
        "one step": lambda: (nfnet(), 1, 3, None),
        "four steps": lambda: (nfnet(), 4, 3, None, {"momentum": 0.9}),
        "damped": lambda: (nfnet(), 3, 3, None, {"momentum": 0.5, "adjoint_decay": 0.5}),
        "TESLA": lambda: (nfnet(), 2, 3, 1, {"adjoint_decay": 0.0}),
        "chunks in a rank": lambda: (nfnet(), 3, NUM_PAIRS, 1, {"momentum": 0.9}),
        "only one rank in chunks": lambda: (nfnet(), 2, NUM_PAIRS, 2),
        "random image tower": lambda: (vit(), 3, NUM_PAIRS, 2),
        "random image tower, a chunk a pair": lambda: (vit(), 2, 3, 1, {"momentum": 0.9}),
        "adapters": lambda: (nfnet(**ADAPTERS), 3, NUM_PAIRS, None),
        "adapters in chunks": lambda: (nfnet(**ADAPTERS), 2, NUM_PAIRS, 1),
        "soft targets": lambda: (soft(), 2, 3, None),
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
            arguments[4][:] = arguments[4][:1] * steps
        frozen = problem.loss_fn.frozen_encoder is not None
        expected = unroll_gradient(*arguments, None if frozen else pair_chunk, **student)
        check_chunks(arguments, pair_chunk, expected, **student)
        matching = matching_gradient(*arguments, pair_chunk, **student)
        parts = [part.sum().item() for part in matching.gradient.tensors()]
        assert ranks.gather(parts) == [parts] * ranks.count(), name  # bit by bit
        print(name)
    ranks.end()
    return 0


@pytest.mark.parametrize("count", [2, 3])
def test_gradient_over_ranks_equals_the_full_unroll(count, tmp_path):
    ended = run_ranks(tmp_path, count, check_all, list(CASES[count]))
    assert [end.code for end in ended] == [0] * count, "".join(end.out + end.err for end in ended)
    assert ended[0].out.splitlines() == list(CASES[count])


def count_bytes():
    ranks.start()
    problem = Problem("test_nfnet").single()
    matching_gradient(*problem.arguments(3, batch_size=NUM_PAIRS))
    planned = bytes_sent(sizes_of(problem), NUM_PAIRS, 3, ranks.count())
    assert ranks.bytes_sent() == pytest.approx(planned, abs=10)  # a third of a message is rounded
    return 0


def test_bytes_are_those_of_the_formula(tmp_path):
    ended = run_ranks(tmp_path, 3, count_bytes)
    assert [end.code for end in ended] == [0] * 3, ended[0].err


def test_benchmark(tmp_path, capsys, monkeypatch):
    """Its ranks are started by the test."""

    def start(count, argv):
        ended = run_ranks(tmp_path / str(count), count, work, [*argv, "--worker"])
        return json.loads(ended[0].out.removeprefix(RESULT))

    monkeypatch.setattr(benchmarks.ranks, "start", start)
    small = {"image_encoder": "test_nfnet", "image_size": 32, "text_dim": 8, "pairs": 4, "steps": 2}
    monkeypatch.setattr(benchmarks.ranks, "PAPER", small)
    flags = ["--image_size", "32", "--text_dim", "8", "--pairs", "4", "--repeats", "1", "--device", "cpu"]
    benchmarks.ranks.main(flags)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    one, two = (dict(zip(rows[0], row, strict=True)) for row in rows[2:4])
    assert float(two["GFLOP a rank"]) == pytest.approx(float(one["GFLOP a rank"]) / 2, abs=0.15)
    assert two["GB sent"] == two["by formula"] != one["GB sent"]
    assert [row[0] for row in rows[6:]] == [f"{n}, {link} GB/s" for link in (300, 25, 12.5) for n in (1, 8)]


def work(argv):
    benchmarks.ranks.main(argv)
    return 0


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
