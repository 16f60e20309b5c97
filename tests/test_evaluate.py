"""evaluate.py: how sets compare in a line, the real texts nearest to the learned ones, and sets exported as folders."""

import json
import os
import re
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import evaluate
from networks.text_encoder import TextEncoder
from tests.programs import error_line, score_sets, table
from utils.scoring import compare_rows, encoder_table
from utils.sets import export, load_synset, save_synset

QUICK = ["--num_eval", "1", "--epoch_eval_train", "1"]


def sets_of(run):
    return [str(run / f"{name}.safetensors") for name in ("iteration_000000", "last")]


# ---- how sets compare


def test_closing_line_gives_ratios_to_the_first_set_and_to_all_data(straight, experts, tmp_path, capsys):
    numbers = tmp_path / "t.json"
    argv = ["--synset", *sets_of(straight), *QUICK, "--all_data", str(experts), "--json", str(numbers)]
    assert evaluate.main(argv) == 0
    first, last, experts_row = json.loads(numbers.read_text())["rows"]
    assert (experts_row["experts"], experts_row["epochs"], experts_row["networks"]) == (2, 2, 2)
    first, last, all_data = (row["mean"]["r_mean"] for row in (first, last, experts_row))
    out = capsys.readouterr().out
    assert "| all data (2 experts, 2 epochs) | all | test_nfnet |" in out
    assert out.splitlines()[-1] == (
        f"mean recall on test_nfnet as a multiple of iteration_000000: last {last / first:.2f}; of all data "
        f"(2 experts, 2 epochs): iteration_000000 {first / all_data:.2f}, last {last / all_data:.2f}"
    )


def row(path, encoder, *recalls, **more):
    return {"set": path, "method": "m", "image_encoder": encoder, "results": [{"r_mean": r} for r in recalls], **more}


def test_ratios_are_of_means_and_for_each_encoder():
    rows = [row("x/a.safetensors", "n", 1.0, 3.0), row("x/b.safetensors", "n", 4.0, 6.0)]
    rows += [row("x/a.safetensors", "v", 5.0), row("x/b.safetensors", "v", 1.0)]
    rows += [row("all data", "v", 10.0, 30.0, experts=2, epochs=1)]
    ratio = statistics.fmean([4.0, 6.0]) / statistics.fmean([1.0, 3.0])
    assert compare_rows(rows) == [
        f"mean recall on n as a multiple of a: b {ratio:.2f}",
        "mean recall on v as a multiple of a: b 0.20; of all data (2 experts, 1 epoch): a 0.25, b 0.05",
    ]


def test_nothing_is_compared_with_nothing_or_zero():
    assert compare_rows([row("a", "n", 1.0)]) == []
    assert compare_rows([row("a", "n", 0.0), row("b", "n", 1.0)]) == []
    alone = [row("a", "n", 2.0), row("all data", "n", 8.0, experts=1, epochs=3)]
    assert compare_rows(alone) == ["mean recall on n as a multiple of all data (1 expert, 3 epochs): a 0.25"]


def test_table_of_several_encoders_has_shares_and_marks_those_that_took_part():
    real, learned = "a/real.safetensors", "a/last.safetensors"
    own = [row(real, "n", 1.0, 3.0, pairs=5), row(learned, "n", 6.0, pairs=5, took_part=True)]
    others = [row(learned, "v", 5.0, pairs=5, took_part=False), row("all data", "n", 8.0, experts=1, epochs=3)]
    assert encoder_table(own) is None
    assert encoder_table(own + others).splitlines() == [
        "| mean recall | pairs | n | v |",
        "| --- | --- | --- | --- |",
        "| real | 5 | 2.0 ± 1.0 (0.25) |  |",
        "| last | 5 | 6.0 ± 0.0 (0.75) * | 5.0 ± 0.0 |",
        "| all data (1 expert, 3 epochs) | all | 8.0 ± 0.0 |  |",
    ]
    of_nothing = [*own, *others[:1], row("all data", "n", 0.0, experts=1, epochs=3)]
    assert "| real | 5 | 2.0 ± 1.0 |  |" in encoder_table(of_nothing)


# ---- --looks


def test_best_of_looks_has_a_column_of_its_own(straight, experts, tmp_path, capsys):
    """Beside it every number, of tuned sets and experts too, is what it is without looks."""
    tables, numbers = [], []
    for argv in ([], ["--looks", "4"]):
        files = ["--json", tmp_path / "t.json", "--markdown", tmp_path / "t.md", "--report", tmp_path / "r.html"]
        argv = [*argv, "--num_eval", "2", "--epoch_eval_train", "4", "--all_data", experts, *files]
        argv += ["--tune_rates", "--grid_img", "0.02", "--grid_txt", "0.2"]
        assert evaluate.main([*map(str, ["--synset", sets_of(straight)[1], *argv])]) == 0
        tables.append(table(capsys.readouterr().out))
        assert table((tmp_path / "t.md").read_text()) == tables[-1]
        numbers.append(json.loads((tmp_path / "t.json").read_text())["rows"])
    (plain, plain_experts), (looked, looked_experts) = numbers
    (head, rows), (head_of_looks, rows_of_looks) = tables
    assert head_of_looks == [*head, "best of 4 looks at test"]
    assert [row[:-1] for row in rows_of_looks] == rows and plain_experts == looked_experts
    assert looked.pop("looks") == 4
    best = {
        key: {name: looked[key].pop(name) for name in list(looked[key]) if "look" in name} for key in ("mean", "std")
    }
    assert looked == plain and set(best["mean"]) == {f"best_look_{key}" for key in plain["mean"] if key != "train_loss"}
    assert best["mean"]["best_look_r_mean"] >= plain["mean"]["r_mean"]
    shown = f"{best['mean']['best_look_r_mean']:.1f} ± {best['std']['best_look_r_mean']:.1f}"
    assert [row[-1] for row in rows_of_looks] == [shown, ""]
    page = (tmp_path / "r.html").read_text()
    assert page.count("best of 4 looks at test") == 1 and shown in page


def test_more_looks_than_epochs(straight, tmp_path, capsys):
    argv = ["--synset", sets_of(straight)[1], "--looks", 5, "--epoch_eval_train", 4, "--json", tmp_path / "t.json"]
    line = error_line(capsys, score_sets, *argv)
    assert "--looks 5" in line and "--epoch_eval_train 4" in line and not (tmp_path / "t.json").exists()


# ---- --texts nearest


def test_texts_are_the_captions_embedded_anew(straight, trained_on, capsys):
    (path,) = sets_of(straight)[1:]
    assert evaluate.main(["--synset", path, *QUICK, "--texts", "nearest"]) == 0
    synset, (used,) = load_synset(path), trained_on
    expected = torch.cat([TextEncoder("demo", "mean").encode([caption]) for caption in synset.captions])
    assert torch.allclose(used.text_syn, expected, atol=1e-5)
    assert not torch.allclose(used.text_syn, synset.text_syn, atol=1e-3)
    assert torch.equal(used.image_syn, synset.image_syn)
    assert "| last (distilled, nearest captions) | 6 |" in capsys.readouterr().out


def test_nearest_texts_with_another_text_encoder(straight, trained_on, save_bert, tmp_path, capsys):
    """Width, encoder and pooling are not those the set was made with, nor those of a second set."""
    (path,) = sets_of(straight)[1:]
    folder = save_bert(tmp_path / "bert")
    other = load_synset(path)
    other.settings["text_encoder"], other.text_syn = "elsewhere", torch.randn(6, 7)
    save_synset(tmp_path / "other.safetensors", other)
    argv = ["--synset", path, tmp_path / "other.safetensors", "--text_encoder", folder, "--text_pooling", "cls", *QUICK]
    assert "elsewhere" in (line := error_line(capsys, score_sets, *argv)) and "--texts nearest" in line
    assert evaluate.main([*map(str, argv), "--texts", "nearest", "--json", str(tmp_path / "t.json")]) == 0
    expected = TextEncoder(folder, "cls").encode(other.captions)
    assert len(trained_on) == 2 and all(torch.allclose(s.text_syn, expected, atol=1e-5) for s in trained_on)
    assert expected.shape == (6, 16)
    assert [row["texts"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]] == ["nearest"] * 2


def test_nearest_texts_of_another_dataset_stay_apart(straight, tmp_path, capsys):
    (path,) = sets_of(straight)[1:]
    other = load_synset(path)
    other.settings["dataset"] = "coco"
    save_synset(tmp_path / "other.safetensors", other)
    line = error_line(capsys, score_sets, "--synset", path, tmp_path / "other.safetensors", "--texts", "nearest")
    assert "dataset=coco" in line


# ---- --export


def check_folder(folder, synset):
    """Pictures, captions, embeddings and rates are the set's."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == synset.captions
    mean, std = np.array(synset.mean), np.array(synset.std)
    for line, pixels in zip(lines, synset.image_syn, strict=True):
        with Image.open(folder / line["file_name"]) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", tuple(pixels.shape[:0:-1]))
            stored = np.asarray(picture).astype(float)
        expected = np.clip(pixels.permute(1, 2, 0).double().numpy() * std + mean, 0, 1) * 255
        assert np.abs(stored - expected).max() < 0.501
    with safe_open(folder / "texts.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("text_syn"), synset.text_syn)
    training = json.loads((folder / "set.json").read_text(encoding="utf-8"))["training"]
    assert (training["syn_lr_img"], training["syn_lr_txt"]) == (synset.syn_lr_img, synset.syn_lr_txt)
    assert training["std"] == list(synset.std)
    names = {"metadata.jsonl", "texts.safetensors", "set.json", "README.md", *(line["file_name"] for line in lines)}
    assert set(os.listdir(folder)) == names and len(names) == 4 + len(lines)


def test_export_of_one_set_needs_nothing_but_the_file(straight, tmp_path, capsys, monkeypatch):
    synset = load_synset(straight / "last.safetensors")
    synset.image_syn = synset.image_syn[:, :, :24] * 3  # far beyond what a picture can show
    synset.captions[0] = "größer"
    synset.settings |= {"image_root": "nowhere", "ann_root": "nowhere", "text_encoder": "nowhere"}
    save_synset(tmp_path / "set.safetensors", synset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in ("new/pictures", "empty"):
        assert evaluate.main(["--synset", "set.safetensors", "--export", folder]) == 0
        check_folder(tmp_path / folder, synset)
        said, cut = capsys.readouterr().out.splitlines()
        assert said == f"6 pairs as pictures, captions and numbers in {folder}"
        assert re.fullmatch(r"set.safetensors: \d+ % of the pixels' values are darker or brighter .* cut", cut)
    assert sorted(os.listdir(tmp_path)) == ["empty", "new", "set.safetensors"]


def test_export_of_several_sets(straight, tmp_path):
    assert evaluate.main(["--synset", *sets_of(straight), "--export", str(tmp_path / "all")]) == 0
    assert sorted(os.listdir(tmp_path / "all")) == ["iteration_000000", "last"]
    for path in sets_of(straight):
        check_folder(tmp_path / "all" / os.path.basename(path).removesuffix(".safetensors"), load_synset(path))


def test_export_writes_over_nothing(straight, tmp_path, capsys):
    (path,) = sets_of(straight)[1:]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert "holds files already" in error_line(capsys, score_sets, "--synset", path, "--export", tmp_path / "full")
    for folder in (tmp_path / "full/mine.txt", tmp_path / "full/mine.txt/below"):
        assert f"cannot write {folder}" in error_line(capsys, score_sets, "--synset", path, "--export", folder)
    assert os.listdir(tmp_path / "full") == ["mine.txt"] and (tmp_path / "full/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_export_leaves_nothing(straight, tmp_path, capsys, monkeypatch, stop):
    def fail(*args):
        raise stop

    monkeypatch.setattr(export, "save_tensors", fail)
    code = evaluate.main(["--synset", *sets_of(straight), "--export", str(tmp_path / "all")])
    assert code == (130 if isinstance(stop, KeyboardInterrupt) else 2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--all_data", "b"], "--all_data"),
        (["--tune_rates"], "--tune_rates"),
        (["--looks", "2"], "--looks"),
        (["--texts", "nearest"], "--texts"),
    ],
)
def test_flags_without_effect_on_an_export(straight, tmp_path, capsys, argv, word):
    line = error_line(capsys, score_sets, "--synset", sets_of(straight)[0], "--export", tmp_path / "x", *argv)
    assert f"leave out {word}" in line and os.listdir(tmp_path) == []


def test_export_of_sets_of_one_name(straight, tmp_path, capsys):
    (path,) = sets_of(straight)[1:]
    (tmp_path / "last.safetensors").write_bytes((straight / "last.safetensors").read_bytes())
    line = error_line(capsys, score_sets, "--synset", path, tmp_path / "last.safetensors", "--export", tmp_path / "x")
    assert "one name" in line and not (tmp_path / "x").exists()
