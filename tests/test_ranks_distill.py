"""distill.py over two processes against one: the same run, a rank that is killed, a resumed run."""

import os
import signal
import time

import pytest
import torch

import distill
from tests.conftest import QUICK_DISTILL
from tests.processes import Ranks, run_ranks
from utils.synset import load_synset


@pytest.fixture(scope="module")
def argv(tiny_argv, experts):
    return [*tiny_argv, *QUICK_DISTILL, "--buffer_path", str(experts), "--no_report"]


@pytest.fixture(scope="module")
def distil(argv, tmp_path_factory):
    """Runs distill.py in `count` processes; its folder."""

    def run(folder, count, *more):
        flags = [*argv, "--save_dir", str(folder), *map(str, more)]
        ended = run_ranks(tmp_path_factory.mktemp("printed"), count, distill.main, flags)
        assert [end.code for end in ended] == [0] * count, "".join(end.err for end in ended)
        return folder

    return run


@pytest.fixture(scope="module")
def of_one_rank(distil, tmp_path_factory):
    return distil(tmp_path_factory.mktemp("runs") / "one", 1, "--Iteration", 4)


def check_same_run(left, right, metrics):
    """But for rounding: sums over ranks have another order."""
    sets = [load_synset(folder / "last.safetensors") for folder in (left, right)]
    for name in ("image_syn", "text_syn", "syn_lr_img", "syn_lr_txt"):
        assert torch.allclose(*(torch.as_tensor(getattr(s, name)) for s in sets), rtol=1e-4, atol=1e-4), name
    lines = [[line for line in metrics(folder) if "Grand_Loss" in line] for folder in (left, right)]
    assert len(lines[0]) == len(lines[1]) == 4
    for one, two in zip(*lines, strict=True):
        assert one | {"Seconds": 0} == pytest.approx(two | {"Seconds": 0}, rel=1e-3)


def test_two_ranks_make_the_run_of_one(of_one_rank, distil, metrics, tmp_path):
    folder = distil(tmp_path / "two", 2, "--Iteration", 4)
    check_same_run(folder, of_one_rank, metrics)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(of_one_rank))
    recalls = [
        {line["step"]: line["Mean/r_mean"] for line in metrics(f) if "r_mean" in line} for f in (folder, of_one_rank)
    ]
    assert list(recalls[0]) == [0, 2, 4] and recalls[0][0] == recalls[1][0]


def test_a_run_goes_on_with_another_number_of_ranks(of_one_rank, distil, metrics, tmp_path):
    folder = distil(tmp_path / "run", 2, "--Iteration", 2)
    distil(folder, 1, "--Iteration", 4, "--resume")
    check_same_run(folder, of_one_rank, metrics)


def test_a_killed_rank_ends_the_run_which_resumes(argv, distil, metrics, tmp_path):
    folder = tmp_path / "run"
    flags = [*argv, "--save_dir", str(folder), "--Iteration", "2000"]
    run = Ranks(tmp_path / "printed", 2, distill.main, flags)
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 6:
        time.sleep(0.05)
    os.kill(run.processes[1].pid, signal.SIGKILL)
    started = time.monotonic()
    first, second = run.end()
    assert time.monotonic() - started < 20
    assert (first.code, second.code) == (2, -signal.SIGKILL)
    (line,) = (line for line in first.err.splitlines() if "warning" not in line.lower())
    assert line.startswith("error: a rank was lost") and "--resume" in line
    done = load_synset(folder / "last.safetensors").settings["iteration"]
    assert done >= 1 and f"stopped at iteration {done}" in first.out
    distil(folder, 1, "--Iteration", done + 1, "--resume")
    assert load_synset(folder / "last.safetensors").settings["iteration"] == done + 1
    steps = [line["step"] for line in metrics(folder) if "Grand_Loss" in line]
    assert steps == list(range(done + 1)) or steps == [*range(done + 1), done]
