"""distill.py over two processes: the run of one, resumed by one; a rank that is killed."""

import os
import signal
import time

import pytest
import torch

import distill
from tests.conftest import QUICK_DISTILL
from tests.processes import Ranks, run_ranks
from utils.sets import load_synset


@pytest.fixture
def argv(tiny_argv, experts, tmp_path):
    """The flags of `run_distill` with the folder "run"."""
    flags = [*tiny_argv, *QUICK_DISTILL, "--buffer_path", str(experts), "--no_report"]
    return [*flags, "--save_dir", str(tmp_path / "run")]


def test_two_ranks_make_the_run_of_one_which_may_resume_it(argv, straight, run_distill, metrics, tmp_path):
    """But for rounding: sums over ranks have another order."""
    ended = run_ranks(tmp_path / "printed", 2, distill.main, [*argv, "--Iteration", "2", "--report"])
    assert [end.code for end in ended] == [0, 0], ended[0].err + ended[1].err
    assert "iteration 2: validation" in ended[0].out and ended[1].out == ""
    folder = tmp_path / "run"
    assert run_distill(folder, "--Iteration", 4, "--resume", "--report") == 0
    assert sorted(os.listdir(folder)) == sorted(os.listdir(straight))
    sets = [load_synset(run / "last.safetensors") for run in (folder, straight)]
    for name in ("image_syn", "text_syn", "syn_lr_img", "syn_lr_txt"):
        assert torch.allclose(*(torch.as_tensor(getattr(s, name)) for s in sets), rtol=1e-4, atol=1e-4), name
    lines = [[line | {"Seconds": 0} for line in metrics(run) if "Grand_Loss" in line] for run in (folder, straight)]
    assert len(lines[0]) == len(lines[1]) == 4
    assert all(one == pytest.approx(two, rel=1e-3) for one, two in zip(*lines, strict=True))
    first = [next(line["r_mean"] for line in metrics(run) if "r_mean" in line) for run in (folder, straight)]
    assert first[0] == pytest.approx(first[1])


def test_a_killed_rank_ends_the_run_which_resumes(argv, run_distill, metrics, tmp_path):
    """The first rates were fitted by both ranks, to what one process finds."""
    folder, fit = tmp_path / "run", ["--lr_teacher_img", "fit"]
    run = Ranks(tmp_path / "printed", 2, distill.main, [*argv, *fit, "--Iteration", "2000"])
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 4:
        time.sleep(0.05)
        assert all(process.is_alive() for process in run.processes)
    os.kill(run.processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    first, second = run.end()
    assert time.monotonic() - killed < 30
    assert (first.code, second.code) == (2, -signal.SIGKILL)
    (line,) = (line for line in first.err.splitlines() if "warning" not in line.lower())
    assert line.startswith("error: a rank was lost") and "--resume" in line
    done = load_synset(folder / "last.safetensors").settings["iteration"]
    assert done >= 1 and f"stopped at iteration {done}" in first.out
    assert run_distill(folder, *fit, "--Iteration", done + 1, "--resume") == 0
    assert load_synset(folder / "last.safetensors").settings["iteration"] == done + 1
    assert run_distill(tmp_path / "one", *fit, "--Iteration", 0) == 0
    sets = [load_synset(path / "iteration_000000.safetensors") for path in (folder, tmp_path / "one")]
    assert sets[0].syn_lr_img == sets[1].syn_lr_img != 0.01
