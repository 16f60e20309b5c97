"""--plan: what it says is what a run then writes, and it writes nothing itself."""

import re

import pytest
from safetensors.torch import load_file

import buffer
import coreset
import distill
from tests.conftest import QUICK_BUFFER, QUICK_DISTILL
from tests.programs import error_line

HEADS = ["--image_trainable", "False", "--only_has_image_projection"]
VIEWS = [*QUICK_BUFFER, *HEADS, "--num_experts", "2", "--aug_views", "2"]
RUNS = {
    "experts of heads": (buffer, VIEWS),
    "whole experts": (buffer, [*QUICK_BUFFER, "--num_experts", "1", "--cache_images"]),
    "kmeans": (coreset, ["--method", "kmeans", "--num_queries", "5"]),
    "forgetting": (coreset, ["--method", "forgetting", *HEADS, "--num_queries", "5", "--train_epochs", "2"]),
    "pairs": (distill, [*QUICK_DISTILL, "--Iteration", "0", "--no_report", "--pix_init", "kmeans"]),
}


@pytest.fixture
def run(tiny_argv, experts, tmp_path):
    """Runs a script in an empty folder; the experts that distill.py needs are elsewhere."""

    def call(script, *more):
        folders = ["--cache_dir", str(tmp_path / "cache")]
        if script is not coreset:
            folders += ["--buffer_path", str(experts if script is distill else tmp_path / "buffer")]
        if script is not buffer:
            folders += ["--save_dir", str(tmp_path / "run")]
        return script.main([*tiny_argv, *folders, *more])

    return call


def in_bytes(text):
    number, unit = re.search(r"([\d.e+-]+) (GB|MB)", text).groups()
    return float(number) * {"GB": 1e9, "MB": 1e6}[unit]


def planned_lines(capsys):
    """The plan's lines: what stands before the first colon, and the rest."""
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)


def bytes_of_numbers(path):
    """Of a cache file without its head."""
    if path.suffix == ".npy":
        return path.stat().st_size - 128
    return sum(tensor.nbytes for tensor in load_file(path).values())


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_tells_what_the_run_writes(run, capsys, tmp_path, name):
    script, flags = RUNS[name]
    capsys.readouterr()
    assert run(script, *flags, "--plan") == 0
    assert list(tmp_path.iterdir()) == []
    lines = planned_lines(capsys)
    assert lines["pictures"].startswith("24 train") and lines["captions"].startswith("120 train")
    assert "about" in lines["memory of the host"] and "about" in lines["in all"]

    assert run(script, *flags) == 0
    capsys.readouterr()
    written = sorted(bytes_of_numbers(path) for path in (tmp_path / "cache").iterdir())
    planned = sorted(in_bytes(text) for what, text in lines.items() if what.startswith("cached "))
    assert planned == pytest.approx(written, rel=0.005)
    assert in_bytes(lines["caches together"]) == pytest.approx(sum(written), rel=0.005)
    for path in (tmp_path / "buffer").glob("**/expert_*.safetensors"):
        size = in_bytes(lines["experts of test_nfnet"].split(",")[1])
        assert size == pytest.approx(bytes_of_numbers(path), rel=0.005)

    assert run(script, *flags, "--plan") == 0
    lines = planned_lines(capsys)
    assert all(text.endswith("there already") for what, text in lines.items() if what.startswith("cached "))
    assert "0 MB yet to be written" in lines["caches together"]


def test_of_several_encoders_mixtures_and_heads(run, capsys, tmp_path):
    encoders = ["--image_encoder", "test_nfnet", "test_resnet", "--image_checkpoint", "none", "none"]
    flags = [*QUICK_DISTILL, *encoders, "--no_image_pretrained", *HEADS, "--Iteration", "3"]
    learned = ["--pix_param", "mixture", "--pix_words", "8", "--txt_param", "mixture", "--txt_terms", "3"]
    for more in ([], learned, ["--lr_teacher_img", "fit", "--syn_aug"]):
        assert run(distill, *flags, *more, "--plan") == 0
        lines = planned_lines(capsys)
        assert {f"cached features of {split} by test_resnet" for split in ("val", "test")} <= lines.keys()
        assert ("19 more to fit" in lines["an iteration"]) == ("fit" in more)
        assert lines["an evaluation"].endswith("4 of them")  # before iterations 0 and 2, after the last, and on test
    assert list(tmp_path.iterdir()) == []


def test_a_plan_has_the_usual_errors(run, capsys, tmp_path):
    missing = ["--image_root", str(tmp_path / "nowhere")]
    assert "no image folder" in error_line(capsys, run, buffer, *QUICK_BUFFER, *missing, "--plan")
    assert "lower it" in error_line(capsys, run, coreset, "--method", "random", "--num_queries", "99", "--plan")
    assert "both give the first pairs" in error_line(
        capsys, run, distill, "--init_set", "S", "--pix_init", "kmeans", "--plan"
    )
