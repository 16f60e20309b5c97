"""What used to end in a traceback: one line, exit code 2, and nothing half-written."""

import shutil

import pytest

import buffer
import distill
from tests.programs import error_line
from utils.scoring.training import NonFiniteLoss
from utils.sets import load_synset


@pytest.fixture(scope="module")
def match(run_distill):
    """A quick run, evaluated after each iteration."""
    quick = "--eval_it", 1, "--num_eval", 1, "--epoch_eval_train", 1, "--no_draw"
    return lambda save_dir, *more: run_distill(save_dir, *quick, *more)


@pytest.fixture(scope="module")
def finished_run(match, tmp_path_factory):
    """Run folder of two iterations."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert match(folder, "--Iteration", 2) == 0
    return folder


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(finished_run, tmp_path / "run")


def test_unknown_mode_of_wandb(tiny_argv, match, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    line = error_line(capsys, match, tmp_path / "r", "--disabled_wandb=false")
    assert "WANDB_MODE=nonsense" in line and "offline" in line
    assert not (tmp_path / "r").exists()
    argv = [*tiny_argv, "--buffer_path", str(tmp_path / "b")]
    assert "WANDB_MODE=nonsense" in error_line(capsys, buffer.main, argv)
    assert not (tmp_path / "b").exists()


def test_evaluation_that_goes_astray_names_iteration_and_flags(match, tmp_path, capsys, monkeypatch):
    evaluate_synset, calls = distill.evaluate_synset, []

    def astray(factory, synset, *args):
        calls.append(synset.settings["iteration"])
        if calls[-1] == 2:
            raise NonFiniteLoss(float("nan"))
        return evaluate_synset(factory, synset, *args)

    monkeypatch.setattr(distill, "evaluate_synset", astray)
    line = error_line(capsys, match, tmp_path / "r", "--Iteration", 4)
    assert "iteration 2 " in line and "--lr_img, --lr_txt or --lr_lr" in line
    assert load_synset(tmp_path / "r/last.safetensors").settings["iteration"] == 1
    assert not (tmp_path / "r/iteration_000002.safetensors").exists()


def test_first_evaluation_that_goes_astray(match, tmp_path, capsys):
    line = error_line(capsys, match, tmp_path / "r", "--epoch_eval_train", 2, "--lr_teacher_img", "1e30")
    assert "iteration 0 " in line and "--lr_teacher_img" in line
    assert not list((tmp_path / "r").glob("*.safetensors"))


def test_run_resumes_with_folders_spelled_in_another_way(run, match, tiny_data, experts, monkeypatch):
    monkeypatch.chdir(tiny_data.parent)
    argv = ["--image_root", tiny_data.name, "--ann_root", f"./{tiny_data.name}", "--buffer_path", f"{experts}/"]
    assert match(run, "--Iteration", 3, "--resume", *argv) == 0
    assert load_synset(run / "last.safetensors").settings["iteration"] == 3


def test_fewer_iterations_than_done(run, match, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    line = error_line(capsys, match, run, "--Iteration", 1, "--resume")
    assert "2 iterations" in line and "--Iteration is 1" in line
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert match(run, "--Iteration", 2, "--resume") == 0


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_picture_to_be_scored_that_cannot_be_read_is_told_at_the_start(match, tiny_data, tmp_path, capsys, split):
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    picture = sorted(folder.glob(f"demo-images/{split}_*.png"))[-1]
    picture.write_bytes(picture.read_bytes()[:100])
    line = error_line(capsys, match, tmp_path / "run", "--image_root", folder, "--Iteration", 1)
    assert str(picture) in line and not (tmp_path / "run").exists()
