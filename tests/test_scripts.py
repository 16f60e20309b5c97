"""buffer.py, distill.py and evaluate.py end to end on the tiny data set, and every wrong input one line."""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch

import buffer
import distill
import evaluate
import utils.setup.data
from data.demo import make_demo
from tests.programs import error_line, score_sets, table
from utils.experts.trajectory import Trajectory
from utils.matching.learner import PairLearner
from utils.sets import load_synset

TENSORS = ("image_syn", "text_syn", "syn_lr_img", "syn_lr_txt")
CUTOFFS = [f"{way}_r{k}" for way in ("txt", "img") for k in (1, 5, 10)]


def expert_folder(root):
    return root / "tiny" / "test_nfnet" / "demo"


def same_set(left, right):
    left, right = (load_synset(path) for path in (left, right))
    return all(torch.equal(torch.as_tensor(getattr(left, n)), torch.as_tensor(getattr(right, n))) for n in TENSORS)


# ---- buffer.py


def test_experts_are_files_of_snapshots(metrics, experts):
    folder = expert_folder(experts)
    *files, start = sorted(os.listdir(folder))
    assert files == ["expert_000.safetensors", "expert_001.safetensors", "metrics.jsonl"]
    assert start.startswith("start_")
    first, second = (Trajectory(folder / f"expert_00{n}.safetensors") for n in range(2))
    assert first.epochs == [0, 1, 2] and len(first.recalls) == 2
    assert first.settings["train_epochs"] == 2 and "r_mean" in first.recalls[0]
    starts = first.snapshot(0), second.snapshot(0)
    for name in starts[0]:
        assert not torch.equal(first.snapshot(1)[name], first.snapshot(2)[name]), name  # no aliases, all train
        if name.startswith("image_encoder."):
            assert torch.equal(starts[0][name], starts[1][name])
    name = "text_projection.fc.weight"
    assert not torch.equal(starts[0][name], starts[1][name])
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 3]  # first the numbers of parameters
    assert all({"train_loss", "train_acc", "r_mean", *CUTOFFS} <= set(line) for line in lines[1:])


def test_second_run_trains_only_the_missing_expert(experts, run_buffer, tmp_path, capsys):
    shutil.copytree(experts, tmp_path / "b")
    folder = expert_folder(tmp_path / "b")
    (folder / "expert_000.safetensors").unlink()
    kept = (folder / "expert_001.safetensors").stat().st_mtime_ns
    assert run_buffer(tmp_path / "b", "--num_experts", 2) == 0
    assert (folder / "expert_001.safetensors").stat().st_mtime_ns == kept
    old, new = (Trajectory(expert_folder(b) / "expert_000.safetensors") for b in (experts, tmp_path / "b"))
    for epoch in range(3):  # expert n depends on seed + n, not on those trained before it
        left, right = old.snapshot(epoch), new.snapshot(epoch)
        assert all(torch.equal(left[name], right[name]) for name in left)
    capsys.readouterr()
    assert run_buffer(tmp_path / "b", "--num_experts", 2) == 0
    assert "all 2 experts" in capsys.readouterr().out


def test_closing_line_says_what_was_made_and_where(run_buffer, metrics, tmp_path, capsys):
    """Of all experts in the folder, those of an earlier run too."""
    for count, experts in ((1, "1 expert"), (2, "2 experts")):
        assert run_buffer(tmp_path / "b", "--num_experts", count, "--train_epochs", 1) == 0
        folder = expert_folder(tmp_path / "b")
        recalls = sorted(line["r_mean"] for line in metrics(folder) if "r_mean" in line)
        span = f"{recalls[0]:.1f} to {recalls[-1]:.1f}" if count > 1 else f"{recalls[0]:.1f}"
        made = f"{experts} of 1 epoch, validation mean {span}, in {folder}; numbers in {folder}/metrics.jsonl"
        assert capsys.readouterr().out.splitlines()[-1] == made


def test_second_run_of_another_recipe_is_refused(experts, run_buffer, capsys):
    line = error_line(capsys, run_buffer, experts, "--num_experts", 3, "--l2", "0.1")
    assert "l2=0.0" in line and "l2=0.1" in line


def test_arguments_of_the_encoder_go_through_all_scripts(run_buffer, run_distill, tmp_path):
    """patch_size=(8, 8), a tuple here, is a list in the saved settings."""
    weights = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8).state_dict()
    torch.save(weights, tmp_path / "vit.pth")
    argv = ["--image_encoder", "test_vit", "--image_kwargs", "patch_size=(8, 8)"]
    argv += ["--image_checkpoint", tmp_path / "vit.pth", "--buffer_path", tmp_path / "b"]
    for _ in range(2):
        assert run_buffer(tmp_path / "b", *argv, "--num_experts", 1) == 0
    assert run_distill(tmp_path / "r", *argv, "--Iteration", 1) == 0
    assert run_distill(tmp_path / "r", *argv, "--Iteration", 2, "--resume") == 0
    assert evaluate.main(["--synset", str(tmp_path / "r/last.safetensors")]) == 0


# ---- distill.py


def test_run_folder_holds_sets_pictures_and_state(straight):
    assert set(os.listdir(straight)) == {
        *("best.safetensors", "last.safetensors", "state.safetensors", "metrics.jsonl", "report.html", "report.json"),
        *(f"iteration_{i:06d}.safetensors" for i in (0, 2, 4)),
        *(f"synthetic_images_{i:06d}.png" for i in (0, 2, 4)),
    }
    first, last = (load_synset(straight / f"{name}.safetensors") for name in ("iteration_000000", "last"))
    assert first.image_syn.shape == (6, 3, 32, 32) and first.text_syn.shape == (6, 128)
    assert (first.syn_lr_img, first.syn_lr_txt) == pytest.approx((0.01, 0.1))
    assert len(last.captions) == 6 and all(last.captions)
    assert last.settings["iteration"] == 4
    assert (first.settings["method"], last.settings["method"]) == ("initial", "distilled")
    for name in TENSORS:
        assert not torch.equal(torch.as_tensor(getattr(first, name)), torch.as_tensor(getattr(last, name))), name
    assert same_set(straight / "last.safetensors", straight / "iteration_000004.safetensors")


def test_pairs_start_from_distinct_real_pairs(straight, tiny_data):
    first = load_synset(straight / "iteration_000000.safetensors")
    rows = json.loads((tiny_data / "tiny_train.json").read_text())
    image_of = {row["caption"].strip(".").lower(): row["image"] for row in rows}
    assert len({image_of[caption] for caption in first.captions}) == 6


def test_best_set_is_the_best_by_validation(metrics, straight):
    recall = {line["step"]: line["Mean/r_mean"] for line in metrics(straight) if "Mean/r_mean" in line}
    assert sorted(recall) == [0, 2, 4]
    best = load_synset(straight / "best.safetensors").settings["iteration"]
    assert recall[best] == max(recall.values())


def test_metrics_have_the_known_names(metrics, straight):
    lines = metrics(straight)
    matching = [line for line in lines if "Grand_Loss" in line]
    assert [line["step"] for line in matching] == [0, 1, 2, 3]
    assert all({"Synthetic_LR_Image", "Synthetic_LR_Text", "Start_Epoch"} <= set(line) for line in matching)
    assert all(line["Grand_Loss"] == pytest.approx(line["Image_Loss"] + line["Text_Loss"]) for line in matching)
    evaluations = [line for line in lines if "r_mean" in line]
    names = [*CUTOFFS, "r_mean"]
    assert all({*names, *(f"{p}/{n}" for p in ("Mean", "Std") for n in names)} <= set(line) for line in evaluations)
    assert lines[-1]["step"] == 4 and {f"Test/{name}" for name in names} <= set(lines[-1])
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)


@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_run_equals_the_straight_one(metrics, straight, run_distill, tmp_path, stop):
    """Stopped at an evaluation or between two, its folder moved."""
    folder = tmp_path / "run"
    assert run_distill(folder, "--Iteration", stop) == 0
    assert load_synset(folder / "last.safetensors").settings["iteration"] == stop
    folder = folder.rename(tmp_path / "moved")
    assert run_distill(folder, "--Iteration", 4, "--resume") == 0
    assert same_set(folder / "last.safetensors", straight / "last.safetensors")
    recalls = [
        {line["step"]: line["Mean/r_mean"] for line in metrics(run) if "Mean/r_mean" in line and line["step"] != 3}
        for run in (folder, straight)
    ]
    assert recalls[0] == recalls[1]


def test_same_command_same_set_other_seed_other_set(metrics, straight, run_distill, tmp_path):
    assert run_distill(tmp_path / "again", "--Iteration", 4) == 0
    assert same_set(tmp_path / "again/last.safetensors", straight / "last.safetensors")
    assert run_distill(tmp_path / "other", "--Iteration", 0, "--seed", 1, "--no_draw", "--no_std") == 0
    assert not same_set(tmp_path / "other/last.safetensors", straight / "iteration_000000.safetensors")
    assert not list((tmp_path / "other").glob("*.png"))
    assert not [line for line in metrics(tmp_path / "other") if "Mean/r_mean" in line]


def test_closing_line_names_files_that_are_there(straight, run_distill, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "r")
    capsys.readouterr()
    for draw in (True, False):
        assert run_distill(tmp_path / "r", "--Iteration", 4, "--resume", f"--draw={draw}") == 0
        line = capsys.readouterr().out.splitlines()[-1]
        patterns = [Path(word.strip(",")) for word in line.split() if word.startswith(str(tmp_path))]
        assert len(patterns) == 2 + draw and all(list(p.parent.glob(p.name)) for p in patterns)
        assert any(p.suffix == ".png" for p in patterns) == draw


def test_noise_initialisation(run_distill, straight, tmp_path):
    assert run_distill(tmp_path / "n", "--Iteration", 1, "--pix_init", "noise", "--txt_init", "noise") == 0
    noise, real = (load_synset(folder / "iteration_000000.safetensors") for folder in (tmp_path / "n", straight))
    assert noise.image_syn.mean().abs() < 0.1 and (noise.image_syn.std() - 1).abs() < 0.1
    assert torch.corrcoef(torch.stack([noise.text_syn.flatten(), real.text_syn.flatten()]))[0, 1].abs() < 0.2


def test_frozen_image_encoder(run_buffer, run_distill, tmp_path):
    """Then the text projection alone is trained, stored and matched."""
    assert run_buffer(tmp_path / "b", "--num_experts", 1, "--no_image_trainable") == 0
    assert run_distill(tmp_path / "r", "--Iteration", 1, "--no_image_trainable", "--buffer_path", tmp_path / "b") == 0
    names = Trajectory(expert_folder(tmp_path / "b") / "expert_000.safetensors").names()
    assert all(name.startswith("text_projection.") for name in names)
    first, last = (load_synset(tmp_path / "r" / f"{name}.safetensors") for name in ("iteration_000000", "last"))
    assert first.syn_lr_img == last.syn_lr_img and first.syn_lr_txt != last.syn_lr_txt
    assert not torch.equal(first.image_syn, last.image_syn)


def test_published_rates_learn(tiny_argv, tmp_path, metrics):
    """β 0.1, rates 1000, 1000 and 0.01, temperature 0.376: better than a student that stays put, and ever better.

    At toy size the text projection alone trains; then staying put costs 1.
    """
    make_demo(tmp_path / "data", num_train=60, num_val=4, num_test=4, image_size=32)
    for split in ("train", "val", "test"):
        (tmp_path / f"data/demo_{split}.json").rename(tmp_path / f"data/tiny_{split}.json")
    data = [*("--image_root", str(tmp_path / "data"), "--ann_root", str(tmp_path / "data")), "--no_image_trainable"]
    common = [*tiny_argv, *data, "--disabled_wandb", "--buffer_path", str(tmp_path / "b")]
    assert buffer.main([*common, "--num_experts", "1", "--train_epochs", "2", "--batch_size_train", "16"]) == 0
    run = ["--save_dir", str(tmp_path / "r"), "--num_queries", "20", "--Iteration", "12", "--eval_it", "12"]
    quick = ["--num_eval", "1", "--epoch_eval_train", "1", "--no_draw", "--no_report"]
    assert distill.main([*common, *run, *quick]) == 0
    lines = [line for line in metrics(tmp_path / "r") if "Grand_Loss" in line]
    losses = [line["Grand_Loss"] for line in lines]
    assert max(losses) < 1 and max(losses[-4:]) < 0.7 * losses[0]
    assert lines[-1]["Student_Loss_Last"] < lines[-1]["Student_Loss_First"]


def test_run_folder_is_not_written_over(straight, run_distill, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    assert "--resume" in error_line(capsys, run_distill, straight, "--Iteration", 4)
    assert "lr_img=10" in error_line(capsys, run_distill, straight, "--Iteration", 6, "--resume", "--lr_img", 20)
    assert {path.name: path.stat().st_mtime_ns for path in straight.iterdir()} == before


def test_nothing_to_resume(run_distill, tmp_path, capsys):
    assert "no run to resume" in error_line(capsys, run_distill, tmp_path / "r", "--resume")
    assert not (tmp_path / "r").exists()


def test_interrupted_run_is_saved_and_resumes(straight, run_distill, tmp_path, capsys, monkeypatch):
    step = PairLearner.step

    def interrupt(self, gradient):
        if self.iteration == 3:
            raise KeyboardInterrupt
        step(self, gradient)

    monkeypatch.setattr(PairLearner, "step", interrupt)
    assert run_distill(tmp_path / "r", "--Iteration", 4) == 130
    monkeypatch.undo()
    assert load_synset(tmp_path / "r/last.safetensors").settings["iteration"] == 3
    assert run_distill(tmp_path / "r", "--Iteration", 4, "--resume") == 0
    assert same_set(tmp_path / "r/last.safetensors", straight / "last.safetensors")


def test_an_evaluation_that_is_cut_off_is_done_again(metrics, straight, run_distill, tmp_path, monkeypatch):
    """Scored, but not yet shown: its picture and its line of metrics.jsonl are made by the run that goes on."""

    def interrupt(log, folder, synset, *_):
        raise KeyboardInterrupt

    assert run_distill(tmp_path / "r", "--Iteration", 1) == 0
    monkeypatch.setattr(distill, "show_evaluation", interrupt)
    assert run_distill(tmp_path / "r", "--Iteration", 2, "--resume") == 130
    monkeypatch.undo()
    assert run_distill(tmp_path / "r", "--Iteration", 2, "--resume") == 0
    assert (tmp_path / "r/synthetic_images_000002.png").exists()
    recalls = [
        [line["r_mean"] for line in metrics(run) if line["step"] == 2 and "r_mean" in line]
        for run in (straight, tmp_path / "r")
    ]
    assert recalls[0] == recalls[1]
    assert same_set(tmp_path / "r/last.safetensors", straight / "iteration_000002.safetensors")


def test_demo_dataset_is_made_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.setup.data, "make_demo", functools.partial(make_demo, num_train=8, num_val=4, num_test=4))
    monkeypatch.chdir(tmp_path)
    quick = ["--dataset", "demo", "--disabled_wandb", "--train_epochs", "1", "--num_experts", "1"]
    assert buffer.main(quick) == 0
    assert (tmp_path / "demo_data/demo_train.json").exists()
    assert (tmp_path / "buffers/demo/test_nfnet_heads/demo/expert_000.safetensors").exists()


# ---- evaluate.py


@pytest.fixture
def run_evaluate(straight):
    def run(*more):
        return evaluate.main(["--synset", str(straight / "best.safetensors"), *map(str, more)])

    return run


def test_evaluation_repeats_the_test_report(metrics, straight, run_evaluate, tmp_path, capsys):
    assert run_evaluate("--json", tmp_path / "numbers.json") == 0
    ((name, *cells),) = table(capsys.readouterr().out)[1]
    method = load_synset(straight / "best.safetensors").settings["method"]
    assert name == f"best ({method})" and cells[:2] == ["6", "test_nfnet"] and len(cells) == 11
    (numbers,) = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert (numbers["set"], numbers["networks"]) == (f"{straight.name}/best.safetensors", 2)
    assert cells[-1] == f"{numbers['mean']['r_mean']:.1f} ± {numbers['std']['r_mean']:.1f}"
    report = metrics(straight)[-1]
    assert numbers["mean"]["r_mean"] == pytest.approx(report["Test/r_mean"])


def test_sets_in_one_table(straight, capsys):
    paths = [str(straight / f"iteration_{i:06d}.safetensors") for i in (0, 4)]
    assert evaluate.main(["--synset", *paths, "--num_eval", "1", "--syn_lr_img", "0.02"]) == 0
    rows = table(capsys.readouterr().out)[1]
    assert ["iteration_000000" in rows[0][0], "iteration_000004" in rows[1][0]] == [True, True]
    assert all(row[3].startswith("0.02 ") for row in rows)


def test_transfer_to_another_encoder_and_size(run_evaluate, capsys):
    argv = ["--image_encoder", "test_vit", "--no_image_pretrained", "--image_size", 48, "--num_eval", 1]
    assert run_evaluate(*argv) == 0
    out = capsys.readouterr().out
    assert "test_vit" in out and len(table(out)[1]) == 1


def test_rates_are_tuned_on_validation(run_evaluate, straight, capsys, monkeypatch):
    asked = []
    score = evaluate.score

    def note(synset, retrieval, num_eval, seed, factory, args, looks):
        asked.append((round(synset.syn_lr_img, 3), round(synset.syn_lr_txt, 3), num_eval, seed))
        results = score(synset, retrieval, num_eval, seed, factory, args, looks)
        if seed == evaluate.VALIDATION_SEED:
            results[0]["r_mean"] = 99.0 if synset.syn_lr_img == 0.03 and synset.syn_lr_txt == 0.2 else 1.0
        return results

    monkeypatch.setattr(evaluate, "score", note)
    assert run_evaluate("--tune_rates", "--grid_img", 0.02, 0.03, "--grid_txt", 0.2, 0.4) == 0
    synset = load_synset(straight / "best.safetensors")
    own = round(synset.syn_lr_img, 3), round(synset.syn_lr_txt, 3)
    tried = [own, (0.02, 0.2), (0.02, 0.4), (0.03, 0.2), (0.03, 0.4)]
    # 0.03 and 0.2 are edges of the grids, which get 0.045 and 0.1.
    tried += [(0.02, 0.1), (0.03, 0.1), (0.045, 0.1), (0.045, 0.2), (0.045, 0.4)]
    assert asked == [(*rates, 1, evaluate.VALIDATION_SEED) for rates in tried] + [(0.03, 0.2, 2, evaluate.TEST_SEED)]
    assert table(capsys.readouterr().out)[1][0][3] == "0.03 0.2"


# ---- wrong input: exit code 2 and one line


@pytest.fixture
def own_data(tiny_data, tmp_path):
    """A copy of the data set to damage, and the flags that point at it."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    return folder, ["--image_root", folder, "--ann_root", folder]


def test_missing_image_folder(run_buffer, tmp_path, capsys):
    folder = tmp_path / "nothing"
    assert str(folder) in error_line(capsys, run_buffer, tmp_path / "b", "--image_root", folder)
    assert not (tmp_path / "b").exists()


def test_missing_pictures(run_buffer, own_data, tmp_path, capsys):
    folder, argv = own_data
    missing = [folder / "demo-images" / f"train_{i:05d}.png" for i in (3, 5)]
    for path in missing:
        path.unlink()
    line = error_line(capsys, run_buffer, tmp_path / "b", *argv)
    assert "2 of 24" in line and str(missing[0]) in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_annotations(run_buffer, own_data, tmp_path, capsys, split):
    folder, argv = own_data
    (folder / f"tiny_{split}.json").unlink()
    line = error_line(capsys, run_buffer, tmp_path / "b", *argv)
    assert f"tiny_{split}.json" in line and str(folder) in line
    assert not (tmp_path / "b").exists()


def test_broken_json(run_buffer, run_distill, own_data, tmp_path, capsys):
    folder, argv = own_data
    (folder / "tiny_train.json").write_text('[{"image": "a.png",')
    for run in (run_buffer, run_distill):
        line = error_line(capsys, run, tmp_path / "b", *argv)
        assert str(folder / "tiny_train.json") in line and "line 1" in line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_unreadable_picture_and_skip_broken(run_buffer, own_data, tmp_path, capsys, split):
    folder, argv = own_data
    path = folder / "demo-images" / f"{split}_00001.png"
    path.write_bytes(path.read_bytes()[:50])
    argv += ["--num_experts", 1, "--train_epochs", 1]
    line = error_line(capsys, run_buffer, tmp_path / "b", *argv)
    assert str(path) in line and "--skip_broken" in line
    assert run_buffer(tmp_path / "b", *argv, "--skip_broken") == 0
    out = capsys.readouterr().out
    assert "left out 1 " in out and str(path) in out


def test_unreadable_picture_in_distillation(run_distill, own_data, tmp_path, capsys):
    folder, argv = own_data
    for path in folder.glob("demo-images/train_*.png"):
        path.write_bytes(b"")
    line = error_line(capsys, run_distill, tmp_path / "r", *argv)
    assert "demo-images/train_" in line and not (tmp_path / "r").exists()


def test_empty_buffer(run_distill, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    line = error_line(capsys, run_distill, tmp_path / "r", "--buffer_path", tmp_path / "b")
    assert str(expert_folder(tmp_path / "b")) in line and "buffer.py" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--image_size", 48, ("image_size=32", "image_size=48")),
        ("--max_start_epoch", 3, ("--max_start_epoch 3", "--expert_epochs 1")),
        ("--num_queries", 25, ("25", "24")),
    ],
)
def test_flags_that_do_not_fit_the_experts_or_the_data(run_distill, tmp_path, capsys, flag, value, words):
    line = error_line(capsys, run_distill, tmp_path / "r", flag, value)
    assert all(word in line for word in words)


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "nonsense", "cut"])
def test_damaged_expert(run_buffer, run_distill, experts, tmp_path, capsys, content):
    shutil.copytree(experts, tmp_path / "b")
    path = expert_folder(tmp_path / "b") / "expert_001.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    assert str(path) in error_line(capsys, run_distill, tmp_path / "r", "--buffer_path", tmp_path / "b")
    assert str(path) in error_line(capsys, run_buffer, tmp_path / "b", "--num_experts", 3)


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "nonsense", "cut"])
def test_damaged_set(straight, tmp_path, capsys, content):
    path = tmp_path / "set.safetensors"
    whole = (straight / "best.safetensors").read_bytes()
    path.write_bytes(whole[:-10] if content is None else content)
    assert str(path) in error_line(capsys, score_sets, "--synset", path)


def test_missing_set_and_a_file_that_is_none(experts, tmp_path, capsys):
    path = tmp_path / "set.safetensors"
    assert f"{path} does not exist" in error_line(capsys, score_sets, "--synset", path)
    path = expert_folder(experts) / "expert_000.safetensors"
    assert f"{path} is not a set" in error_line(capsys, score_sets, "--synset", path)


def test_set_of_another_text_pooling_is_carried(run_evaluate, capsys):
    assert run_evaluate("--text_pooling", "cls") == 0
    assert "text encoder demo (mean) -> demo (cls): linear map fitted on" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--image_encoder", "--text_encoder"])
def test_unknown_encoder(run_buffer, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "nfnet_l" if flag == "--image_encoder" else str(tmp_path / "bertt")
    line = error_line(capsys, run_buffer, tmp_path / "b", flag, name)
    assert name in line and ("nfnet_l0" in line if flag == "--image_encoder" else "distilbert" in line)


def test_non_finite_loss_keeps_the_last_good_set(run_distill, tmp_path, capsys):
    argv = ["--Iteration", 6, "--lr_img", "1e38", "--eval_it", 6]
    line = error_line(capsys, run_distill, tmp_path / "r", *argv)
    assert "finite" in line and "lower" in line
    synset = load_synset(tmp_path / "r/last.safetensors")
    assert synset.settings["iteration"] == 0 and synset.image_syn.abs().max() < 10
    assert same_set(tmp_path / "r/last.safetensors", tmp_path / "r/iteration_000000.safetensors")
    assert not list((tmp_path / "r").glob(".*"))


def test_file_in_the_place_of_a_folder(run_buffer, run_distill, run_evaluate, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    for run in (run_buffer, run_distill):
        assert str(path) in error_line(capsys, run, path)
    assert str(path) in error_line(capsys, run_evaluate, "--num_eval", 1, "--json", path / "numbers.json")
    assert run_evaluate("--num_eval", 1, "--json", tmp_path / "new/numbers.json") == 0


def test_non_finite_training_of_an_expert(run_buffer, tmp_path, capsys):
    line = error_line(capsys, run_buffer, tmp_path / "b", "--num_experts", 1, "--lr_teacher_img", "1e38")
    assert "lower the learning rates" in line
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_device_that_is_not_there(run_buffer, run_distill, run_evaluate, tmp_path, capsys, name):
    for run in (run_buffer, run_distill):
        assert f"--device {name}" in error_line(capsys, run, tmp_path / "x", "--device", name)
    assert f"--device {name}" in error_line(capsys, run_evaluate, "--device", name)
    assert not (tmp_path / "x").exists()


def test_full_disk_while_distilling(straight, run_distill, tmp_path, capsys, monkeypatch):
    shutil.copytree(straight, tmp_path / "r")
    before = (tmp_path / "r/last.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.files.save_file", fail)
    line = error_line(capsys, run_distill, tmp_path / "r", "--Iteration", 6, "--resume")
    assert "No space left" in line
    assert (tmp_path / "r/last.safetensors").read_bytes() == before
    assert not list((tmp_path / "r").glob(".*"))
