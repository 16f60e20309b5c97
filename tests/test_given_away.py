"""What is made to be given away names no place of the machine, and says what it is."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.conftest import ENCODER_WEIGHTS
from tests.programs import error_line, score_sets
from utils.sets import load_synset, save_synset, shown_command, shown_path

QUICK = ["--num_eval", "2", "--epoch_eval_train", "2"]


@pytest.fixture(scope="module")
def given(straight, tmp_path_factory):
    """A set exported with its scores on two encoders, beside its tables and its page, and in the form of LoRS."""
    root = tmp_path_factory.mktemp("given")
    best = straight / "best.safetensors"
    tables = ["--markdown", root / "t.md", "--json", root / "t.json", "--report", root / "r.html"]
    elsewhere = ["--image_encoder", "test_nfnet", "test_vit", "--image_pretrained", "False"]
    checkpoints = ["--image_checkpoint", ENCODER_WEIGHTS, "none"]
    argv = ["--synset", best, *QUICK, *tables, *elsewhere, *checkpoints]
    assert score_sets(*argv, "--export", root / "set", "--license", "cc-by-4.0") == 0
    assert score_sets("--synset", best, "--export_pt", root / "set.pt") == 0
    assert score_sets("--synset", best, straight / "last.safetensors", "--export", root / "two") == 0
    (root / "report.html").write_bytes((straight / "report.html").read_bytes())
    return root


def test_no_place_of_the_machine_is_in_it(given, straight, tiny_data):
    files = [path for path in given.rglob("*") if path.is_file()]
    assert len(files) > 20
    places = [given, given.parent, straight.parent, tiny_data, ENCODER_WEIGHTS.parent, Path.home()]
    for file in files:
        content = file.read_bytes()
        assert [place for place in places if str(place).encode() in content] == [], file


def test_a_set_in_its_run_keeps_what_is_inherited(straight, tiny_data):
    settings = load_synset(straight / "best.safetensors").settings
    assert (settings["image_root"], settings["image_checkpoint"]) == (str(tiny_data), str(ENCODER_WEIGHTS))


def test_the_card_says_what_the_set_is(given):
    card = (given / "set/README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nconfigs:")
    digest = hashlib.sha256(ENCODER_WEIGHTS.read_bytes()).hexdigest()
    assert f"| demo_nfnet.safetensors, SHA-256 {digest} |" in card
    assert "| test_nfnet, 32 px |" in card and "| demo, pooling mean |" in card and "| tiny |" in card
    assert "Flickr30K and COCO" in card and "owners' terms" in card
    rows = json.loads((given / "t.json").read_text())["rows"]
    for row, home in zip(rows, ("yes", "no"), strict=True):
        line = next(line for line in card.splitlines() if line.startswith(f"| {row['image_encoder']} | demo |"))
        mean = f"{row['mean']['r_mean']:.1f} ± {row['std']['r_mean']:.1f}"
        assert f"| {home} | 2 |" in line and line.endswith(f"| {mean} |")


def test_a_card_has_the_scores_of_the_sets_own_run_and_no_licence(given, straight):
    card = (given / "two/best/README.md").read_text()
    (row,) = [r for r in json.loads((straight / "report.json").read_text())["test"] if r["set"].startswith("best, ")]
    assert f"{row['mean']['r_mean']:.1f} ± {row['std']['r_mean']:.1f} |" in card
    assert "license:" not in card and "| licence | none was given |" in card
    assert "not scored" in (given / "two/last/README.md").read_text()


def test_words_of_a_stranger_stay_words_in_the_card(straight, tmp_path):
    synset = load_synset(straight / "last.safetensors")
    synset.settings |= {"method": "<script>a</script> | b", "loss": "x"}
    save_synset(tmp_path / "s.safetensors", synset)
    assert score_sets("--synset", tmp_path / "s.safetensors", "--export", tmp_path / "f") == 0
    card = (tmp_path / "f/README.md").read_text()
    assert "<script>" not in card and "&lt;script&gt;a&lt;/script&gt; \\| b" in card


def test_a_set_does_not_say_where_caches_are_made(straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synset = load_synset(straight / "last.safetensors")
    synset.settings["cache_dir"] = str(tmp_path / "elsewhere")
    save_synset("s.safetensors", synset)
    assert score_sets("--synset", "s.safetensors", *QUICK) == 0
    assert (tmp_path / "cache").is_dir() and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("set.safetensors", "set.safetensors"),
        ("runs/a/best.safetensors", "runs/a/best.safetensors"),
        ("/home/me/runs/a/best.safetensors", "a/best.safetensors"),
        ("../me/a/best.safetensors", "a/best.safetensors"),
        ("/best.safetensors", "best.safetensors"),
    ],
)
def test_paths_as_they_are_shown(path, shown):
    assert shown_path(path) == shown


def test_commands_as_they_are_shown():
    words = ["distill.py", "--save_dir", "runs/a", "--image_root=/home/me/I", "--ann_root", "~/A", "--lr_img", "1e-2"]
    assert shown_command(words) == "distill.py --save_dir runs/a --image_root=I --ann_root A --lr_img 1e-2"


def test_a_folder_that_is_full_is_told_before_anything_is_scored(straight, tmp_path, capsys):
    (tmp_path / "a").write_text("")
    argv = ["--synset", straight / "best.safetensors", "--export", tmp_path, "--json", tmp_path / "t.json"]
    assert "holds files" in error_line(capsys, score_sets, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
