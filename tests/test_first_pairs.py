"""What distillation starts from: k-means prototypes, or the pairs of a set of coreset.py or distill.py."""

import pytest
import torch

import coreset
from tests.programs import error_line
from utils.report.words import describe
from utils.sets import load_synset, save_synset


@pytest.fixture(scope="module")
def distil(run_distill):
    """Runs distill.py with the least evaluation."""
    return lambda folder, *argv: run_distill(folder, "--num_eval", 1, "--epoch_eval_train", 1, "--no_draw", *argv)


@pytest.fixture(scope="module")
def prototypes(tiny_argv, tmp_path_factory):
    """The set of coreset.py --method kmeans."""
    path = tmp_path_factory.mktemp("coreset") / "kmeans.safetensors"
    argv = ["--method", "kmeans", "--num_queries", "6", "--no_draw", "--output", str(path)]
    assert coreset.main([*tiny_argv, *argv]) == 0
    return path


def first(folder):
    return load_synset(folder / "iteration_000000.safetensors")


def test_kmeans_starts_from_the_coreset_of_that_name(distil, prototypes, tmp_path):
    assert distil(tmp_path / "a", "--Iteration", 0, "--pix_init", "kmeans") == 0
    start, chosen = first(tmp_path / "a"), load_synset(prototypes)
    assert torch.equal(start.image_syn, chosen.image_syn) and torch.equal(start.text_syn, chosen.text_syn)
    assert distil(tmp_path / "b", "--Iteration", 0, "--pix_init", "kmeans", "--txt_init", "noise") == 0
    noisy = first(tmp_path / "b")
    assert torch.equal(noisy.image_syn, chosen.image_syn) and (noisy.text_syn != chosen.text_syn).all()
    assert "real pictures and real texts, of the pairs nearest to the centres of k-means" in describe(start.settings)[0]
    assert "real pictures and noise for texts, of" in describe(noisy.settings)[0]


def test_iterations_do_not_depend_on_where_the_first_pairs_came_from(distil, prototypes, tmp_path):
    """Features from the cache or made anew, or the set that holds the same pairs."""
    cold = ["--cache_dir", tmp_path / "cold"]
    runs = {
        "warm": ["--pix_init", "kmeans"],
        "cold": ["--pix_init", "kmeans", *cold],
        "set": ["--init_set", prototypes],
    }
    for name, argv in runs.items():
        assert distil(tmp_path / name, "--Iteration", 1, *argv) == 0
    ends = [load_synset(tmp_path / name / "last.safetensors") for name in runs]
    assert all(torch.equal(end.image_syn, ends[0].image_syn) for end in ends[1:])
    assert not torch.equal(ends[0].image_syn, first(tmp_path / "warm").image_syn)


def test_any_set_is_a_start(distil, straight, tmp_path):
    """Of a distilled set pictures and texts alone: the rates are the flags'. The run goes on as if never stopped."""
    given = load_synset(straight / "last.safetensors")
    source = tmp_path / "given.safetensors"
    save_synset(source, given)
    argv = ["--init_set", source, "--optimizer", "adam"]
    assert distil(tmp_path / "whole", "--Iteration", 2, *argv) == 0
    start = first(tmp_path / "whole")
    assert torch.equal(start.image_syn, given.image_syn) and torch.equal(start.text_syn, given.text_syn)
    assert (start.syn_lr_img, start.syn_lr_txt) == pytest.approx((0.01, 0.1)) != (given.syn_lr_img, given.syn_lr_txt)
    assert start.settings["method"] == "initial" and start.settings["init_set"] == str(source)
    assert f"the pictures of {source} and the texts of {source}" in describe(start.settings)[0]
    assert distil(tmp_path / "parts", "--Iteration", 1, *argv) == 0
    assert distil(tmp_path / "parts", "--Iteration", 2, *argv, "--resume") == 0
    ends = [load_synset(tmp_path / name / "last.safetensors") for name in ("whole", "parts")]
    assert torch.equal(ends[0].image_syn, ends[1].image_syn) and ends[0].syn_lr_img == ends[1].syn_lr_img


def test_resumed_with_another_start(run_distill, straight, prototypes, capsys):
    """`straight` has no start of its own; nothing of it is touched."""
    line = error_line(capsys, run_distill, straight, "--Iteration", 6, "--resume", "--init_set", prototypes)
    assert "init_set=None" in line and str(prototypes) in line


def test_noise_in_place_of_a_modality_of_the_set(distil, prototypes, tmp_path):
    assert distil(tmp_path, "--Iteration", 0, "--init_set", prototypes, "--pix_init", "noise") == 0
    start, given = first(tmp_path), load_synset(prototypes)
    assert torch.equal(start.text_syn, given.text_syn) and (start.image_syn != given.image_syn).all()


def change(name):
    """The set with one part that does not fit."""

    def changed(synset):
        if name == "number of pairs":
            synset.image_syn, synset.text_syn = synset.image_syn[:5], synset.text_syn[:5]
            synset.captions = synset.captions[:5]
        elif name == "picture size":
            synset.image_syn = synset.image_syn[..., :24]
        elif name == "text width":
            synset.text_syn = synset.text_syn[:, :10]
        elif name == "mean and std":
            synset.mean = (0.4, 0.5, 0.5)
        else:
            synset.settings[name] = "other"
        return synset

    return changed


@pytest.mark.parametrize(
    "part", ["number of pairs", "picture size", "text width", "mean and std", "text_encoder", "text_pooling"]
)
def test_set_that_does_not_fit_the_run(distil, prototypes, tmp_path, capsys, part):
    path = tmp_path / "set.safetensors"
    save_synset(path, change(part)(load_synset(prototypes)))
    line = error_line(capsys, distil, tmp_path / "run", "--init_set", path)
    assert f"--init_set {path} does not fit: its {part} is" in line and not (tmp_path / "run").exists()


def test_starts_that_cannot_be(distil, prototypes, tmp_path, capsys):
    refused = [
        (["--init_set", prototypes, "--pix_init", "kmeans"], "both give the first pairs"),
        (["--init_set", tmp_path / "none.safetensors"], "none.safetensors does not exist"),
        (["--pix_init", "kmeans", "--no_image_pretrained", "--image_checkpoint", ""], "pretrained image encoder"),
    ]
    for argv, words in refused:
        assert words in error_line(capsys, distil, tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()
