"""Learned texts under another text encoder: the map against known ones, evaluate.py on two encoders, wrong input."""

import json

import pytest
import torch

import evaluate
from data.annotations import clean_caption, read_sentences, read_split
from data.errors import InputError
from networks.text_encoder import TextEncoder
from utils.scoring import text_map
from utils.scoring.text_map import LEAST_GROUPS, RIDGES, choose_map, explained_variance, fit_maps
from utils.sets import load_synset, save_synset

QUICK = ["--num_eval", "1", "--epoch_eval_train", "1"]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the map


@pytest.mark.parametrize("wide", [4, 8, 15])
def test_a_linear_image_of_the_encoder_is_found(wide, monkeypatch):
    """Narrower, as wide and wider; far from the origin, in several blocks."""
    monkeypatch.setattr(text_map, "BLOCK", 64)
    source, learned = normal(0, 400, 8) + 3, 2 * normal(1, 5, 8)
    weight, bias = normal(2, 8, wide), 10 * normal(3, wide)
    found, ridge, explained = choose_map(source, source @ weight + bias, torch.arange(400), seed=0)
    assert torch.allclose(found(learned), learned @ weight + bias, atol=1e-5, rtol=0)
    assert ridge == RIDGES[0] and explained == pytest.approx(1, abs=1e-10)


def test_the_fit_is_ridge_regression():
    """Its weights solve (XᵀX + λ mean diagonal) W = XᵀY of what is centred; the mean goes to the mean."""
    source, target = normal(0, 50, 6) + 1, normal(1, 50, 3) - 2
    x, y = source - source.mean(0), target - target.mean(0)
    for ridge, found in zip((0.01, 2.0), fit_maps(source, target, (0.01, 2.0)), strict=True):
        penalty = ridge * (x.T @ x).diagonal().mean() * torch.eye(6, dtype=torch.float64)
        assert torch.allclose(found.weight, torch.linalg.solve(x.T @ x + penalty, x.T @ y), atol=1e-12)
        assert torch.allclose(found(source.mean(0)), target.mean(0), atol=1e-12)
        share = 1 - (target - found(source)).square().sum() / y.square().sum()
        assert explained_variance(found, source, target) == pytest.approx(share.item())


def test_the_ridge_that_does_best_on_held_out_sentences_beats_both_ends():
    """Few sentences for the width, with noise: a small ridge fits the noise, a large one nothing."""
    weight = normal(1, 60, 10)
    source = normal(0, 2100, 60)
    target = source @ weight + 12 * normal(2, 2100, 10)
    found, ridge, explained = choose_map(source[:100], target[:100], torch.arange(100), seed=0)
    assert RIDGES[0] < ridge < RIDGES[-1] and explained < 0.9
    ends = fit_maps(source[:100], target[:100], (RIDGES[0], RIDGES[-1]))
    elsewhere = [explained_variance(each, source[100:], target[100:]) for each in (found, *ends)]
    assert elsewhere[0] > max(elsewhere[1:]) + 0.02
    assert torch.equal(found.weight, fit_maps(source[:100], target[:100], [ridge])[0].weight)  # fitted on all


def test_sentences_of_a_group_are_held_out_together(monkeypatch):
    parts = []
    explained = text_map.explained_variance
    monkeypatch.setattr(text_map, "explained_variance", lambda m, x, y: parts.append(x) or explained(m, x, y))
    groups = torch.arange(40).repeat_interleave(5)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    source = torch.cat([groups[:, None].double(), normal(0, 200, 3)], dim=1)
    for seed in (0, 1):
        choose_map(source, normal(1, 200, 2), groups, seed)
    first, second = (part[:, 0].unique(return_counts=True) for part in (parts[0], parts[-1]))
    assert first[1].tolist() == second[1].tolist() == [5] * 4 and first[0].tolist() != second[0].tolist()


def test_what_no_map_can_be_fitted_on():
    rows, groups = normal(0, LEAST_GROUPS, 3), torch.arange(LEAST_GROUPS)
    choose_map(rows, rows, groups, 0)
    with pytest.raises(InputError, match="not 19"):
        choose_map(rows[1:], rows[1:], groups[1:], 0)
    for source in (torch.ones_like(rows), rows * torch.inf):
        with pytest.raises(InputError, match="finite and differ"):
            choose_map(source, rows, groups, 0)


# ---- evaluate.py


@pytest.fixture
def bert(save_bert, tmp_path):
    return save_bert(tmp_path / "bert")


def set_of(tmp_path, straight, name, **settings):
    """A copy of the learned set with other settings; and its file."""
    synset = load_synset(straight / "last.safetensors")
    synset.settings.update(settings)
    save_synset(tmp_path / f"{name}.safetensors", synset)
    return synset, str(tmp_path / f"{name}.safetensors")


def test_sets_are_carried_each_from_its_own_text_encoder(straight, bert, save_bert, tiny_data, trained_on, tmp_path):
    """One of the demo's encoder, one of another width, one of the run's own, and the real pairs of the first."""
    third = save_bert(tmp_path / "third", seed=6)
    other, other_path = set_of(tmp_path, straight, "other", text_encoder=third)
    other.text_syn = TextEncoder(third, "mean").encode(["red circle", "blue box", "star", "heart", "wall", "ball"])
    save_synset(other_path, other)
    own, own_path = set_of(tmp_path, straight, "own", text_encoder=bert)
    own.text_syn = normal(0, 6, 16).float()
    save_synset(own_path, own)
    files = [str(straight / "last.safetensors"), other_path, own_path, str(straight / "iteration_000000.safetensors")]
    argv = ["--synset", *files, "--text_encoder", bert, *QUICK, "--json", str(tmp_path / "t.json")]
    assert evaluate.main([*argv, "--markdown", str(tmp_path / "t.md")]) == 0

    captions = [caption for record in read_split("tiny", "train", tiny_data) for caption in record.captions]
    groups = torch.arange(24).repeat_interleave(5)
    to = TextEncoder(bert, "mean")
    for used, file, home in zip(trained_on[:2], files[:2], ("demo", third), strict=True):
        embeds = [encoder.encode(captions) for encoder in (TextEncoder(home, "mean"), to)]
        expected = choose_map(*embeds, groups, 0)[0](load_synset(file).text_syn)
        assert torch.allclose(used.text_syn, expected.float(), atol=1e-4)
        assert used.text_syn.dtype == torch.float32 and used.text_syn.shape == (6, 16)
    assert torch.equal(trained_on[2].text_syn, own.text_syn)
    assert torch.allclose(trained_on[3].text_syn, to.encode(trained_on[3].captions), atol=1e-5)
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["texts"] for row in rows] == ["carried", "carried", "learned", "captions"]
    table = (tmp_path / "t.md").read_text()
    for label in ("last (distilled, texts carried)", "own (distilled)", "(initial, captions embedded anew)"):
        assert label in table


def test_the_line_says_how_texts_were_carried(straight, bert, tmp_path, capsys):
    path = str(straight / "last.safetensors")
    assert evaluate.main(["--synset", path, "--text_encoder", bert, *QUICK]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "linear map" in line]
    assert line.startswith(
        f"text encoder demo (mean) -> {bert} (mean): linear map fitted on 120 sentences of the train"
    )
    assert "ridge " in line and " of the variance of a tenth of them" in line


def test_the_same_weights_under_another_name(straight, bert, trained_on, tmp_path, capsys):
    synset, path = set_of(tmp_path, straight, "one", text_encoder=bert)
    synset.text_syn = normal(0, 6, 16).float()
    save_synset(path, synset)
    assert evaluate.main(["--synset", path, "--text_encoder", f"{bert}/", *QUICK]) == 0
    assert "the same weights, texts stay as they are" in capsys.readouterr().out
    assert torch.equal(trained_on[0].text_syn, synset.text_syn) and trained_on[0].texts == "learned"


SENTENCES = [
    f"a {size} {colour} {shape}."
    for size in ("big", "small")
    for colour in ("red", "blue", "green", "gray")
    for shape in ("circle", "box", "heart", "star")
]


def test_sentences_of_a_file(straight, bert, trained_on, tmp_path, capsys):
    """As text and as JSON; cleaned as captions are, each once, without empty lines. No training captions are read."""
    (tmp_path / "s.txt").write_text("\n".join(["", *SENTENCES, SENTENCES[0]]), encoding="utf-8")
    (tmp_path / "s.json").write_text(json.dumps([*SENTENCES, " "]))
    for name in ("s.txt", "s.json"):
        assert read_sentences(tmp_path / name) == [clean_caption(sentence) for sentence in SENTENCES]
        path = str(straight / "last.safetensors")
        argv = ["--synset", path, "--text_encoder", bert, "--map_captions", str(tmp_path / name), *QUICK]
        assert evaluate.main(argv) == 0
        assert f"fitted on 32 sentences of {tmp_path / name}; ridge" in capsys.readouterr().out
    assert torch.equal(trained_on[0].text_syn, trained_on[1].text_syn)


def test_sentences_that_nothing_needs(straight, tmp_path, capsys):
    path = str(straight / "last.safetensors")
    assert evaluate.main(["--synset", path, "--map_captions", "nowhere.txt", *QUICK]) == 0
    assert "warning: --map_captions is without effect" in capsys.readouterr().out
    assert "--texts nearest" in error_line(capsys, "--synset", path, "--map_captions", "x", "--texts", "nearest")
    assert "--map_captions" in error_line(capsys, "--synset", path, "--map_captions", "x", "--export", tmp_path / "x")


# ---- wrong input


def error_line(capsys, *argv):
    capsys.readouterr()
    assert evaluate.main([*map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.txt", b"", "holds no sentence"),
        ("blank.txt", b" \n.\n", "holds no sentence"),
        ("empty.json", b"[]", "holds no sentence"),
        ("table.json", b'{"a": 1}', "not a list of strings"),
        ("rows.json", b'["a", 1]', "not a list of strings"),
        ("broken.json", b'["a"', "broken JSON"),
        ("latin.txt", "größer".encode("latin-1"), "give a readable UTF-8 file"),
        ("few.txt", b"a circle\na box\na circle", "not 2; give other sentences with --map_captions"),
        ("missing.txt", None, "cannot read"),
    ],
)
def test_files_without_sentences(straight, bert, tmp_path, capsys, name, content, words):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    path = straight / "last.safetensors"
    line = error_line(capsys, "--synset", path, "--text_encoder", bert, "--map_captions", file)
    assert str(file) in line and words in line


def test_a_home_encoder_that_is_not_here(straight, tmp_path, capsys):
    _, path = set_of(tmp_path, straight, "set", text_encoder=str(tmp_path / "gone"))
    line = error_line(capsys, "--synset", path, "--text_encoder", "demo")
    assert path in line and str(tmp_path / "gone") in line and "--texts nearest works without it" in line


def test_a_home_encoder_that_is_not_the_set_s(straight, bert, tmp_path, capsys):
    _, path = set_of(tmp_path, straight, "set", text_encoder=bert)
    line = error_line(capsys, "--synset", path, "--text_encoder", "demo")
    assert path in line and "width 128" in line and "gives 16" in line


def test_a_set_that_does_not_say_its_pooling(straight, bert, tmp_path, capsys):
    synset, path = set_of(tmp_path, straight, "set")
    del synset.settings["text_pooling"]
    save_synset(path, synset)
    line = error_line(capsys, "--synset", path, "--text_encoder", bert, "--text_pooling", "mean")
    assert path in line and "lacks text_pooling" in line and "--texts nearest" in line


def test_a_released_set_of_another_width(straight, bert, tmp_path, capsys):
    file = tmp_path / "released.pt"
    first = str(straight / "last.safetensors")
    assert evaluate.main(["--synset", first, "--export_pt", str(file)]) == 0
    line = error_line(capsys, "--synset", first, file, "--text_encoder", bert)
    assert str(file) in line and "width 128" in line


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"method": "kmeans"}, True),
        ({"method": "prototypes"}, False),
        ({"method": "distilled"}, False),
        ({"method": "distilled texts"}, False),
        ({"method": "distilled images", "txt_init": "real"}, True),
        ({"method": "initial", "txt_init": "noise"}, False),
        ({"method": "initial", "init_set": "other.safetensors"}, False),
        ({"method": "distilled elsewhere"}, False),
    ],
)
def test_whose_texts_are_captions(straight, settings, expected):
    synset = load_synset(straight / "last.safetensors")
    synset.settings = {"init_set": None, **settings}
    assert synset.texts_are_captions is expected
