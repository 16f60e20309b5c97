"""Texts as sums of few sentences: the pursuit against brute force, sets that hold them, other text encoders."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import buffer
import distill
from data.annotations import clean_caption, read_sentences
from networks.text_encoder import TextEncoder
from tests.conftest import QUICK_BUFFER, QUICK_DISTILL
from tests.programs import error_line, input_error, score_sets
from utils.forms import Sentences
from utils.matching import pursue
from utils.sets import export_sets, load_synset, save_synset
from utils.setup import dictionary

MIXTURE = ["--txt_param", "mixture", "--txt_terms", "3", "--no_draw"]
QUICK = ["--num_eval", "1", "--epoch_eval_train", "1"]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the pursuit


def brute_force(target, atoms, terms):
    """Orthogonal matching pursuit of one target, a least squares problem a step."""
    taken, weights, left = [], np.zeros(0), target
    for _ in range(terms):
        cosines = [abs(left @ atom) / np.linalg.norm(atom) for atom in atoms]
        taken.append(max((i for i in range(len(atoms)) if i not in taken), key=lambda i: cosines[i]))
        weights = np.linalg.lstsq(atoms[taken].T, target, rcond=None)[0]
        left = target - atoms[taken].T @ weights
    return taken, weights


def test_the_pursuit_is_that_of_least_squares():
    """For atoms of all lengths, alike and not; up to as many as a target has dimensions."""
    atoms = normal(0, 40, 9) * (1 + 5 * torch.rand(40, 1, dtype=torch.float64)) + 2
    targets = normal(1, 12, 9) + 1
    for terms in (1, 4, 9):
        rows, weights = pursue(targets, atoms, terms)
        for i, target in enumerate(targets):
            taken, expected = brute_force(target.numpy(), atoms.numpy(), terms)
            assert rows[i].tolist() == taken
            assert np.allclose(weights[i], expected, atol=1e-8)


def test_a_target_made_of_few_atoms_has_no_more():
    """What is found exactly gets no further weights, beside targets that need them all; single precision too."""
    atoms = normal(0, 30, 20)
    targets = torch.stack([3 * atoms[4], torch.zeros(20, dtype=torch.float64), normal(1, 20)])
    for kind in (torch.float32, torch.float64):
        rows, weights = pursue(targets.to(kind), atoms.to(kind), 6)
        assert rows[0, 0] == 4 and weights[0, 0].item() == pytest.approx(3)
        assert (weights[0, 1:] == 0).all() and (weights[1] == 0).all() and (weights[2] != 0).all()
    assert all(len(set(row)) == 6 for row in rows.tolist())


def test_an_atom_that_is_there_twice_is_taken_once():
    atoms = normal(0, 3, 5)[[0, 1, 1, 2, 2]]
    rows, weights = pursue(normal(1, 4, 5), atoms, 5)
    assert torch.isfinite(weights).all() and ((weights != 0).sum(dim=1) == 3).all()
    fitted = torch.einsum("mk,mkd->md", weights, atoms[rows])
    expected = np.linalg.lstsq(atoms[[0, 1, 3]].T.numpy(), normal(1, 4, 5).T.numpy(), rcond=None)[0]
    assert np.allclose(fitted, (atoms[[0, 1, 3]].T.numpy() @ expected).T)


# ---- what a set holds


def test_sentences_are_in_one_order():
    texts = [[("a", 0.5), ("b", -2.0)], [], [("c", 1.0), ("b", 3.0)]]
    sentences = Sentences.of(texts)
    assert sentences.sentences == ["b", "a", "c"]
    assert sentences.texts() == [[("b", -2.0), ("a", 0.5)], [], [("b", 3.0), ("c", 1.0)]]
    assert sentences.mix(torch.tensor([[1.0, 0], [0, 1], [10, 0]])).tolist() == [[-2, 0.5], [0, 0], [13, 0]]


@pytest.fixture(scope="module")
def mixed(run_distill, tmp_path_factory):
    """Run folder of four iterations, with a report and an average."""
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    assert run_distill(folder, *MIXTURE, "--Iteration", 4, "--report", "--ema_decay", 0.5) == 0
    return folder


def embedded(synset, encoder):
    """The set's texts by a text encoder, sentence by sentence."""
    texts = synset.sentences.texts()
    return torch.stack([sum(weight * encoder.encode([s])[0] for s, weight in text) for text in texts])


def test_a_run_saves_texts_of_three_captions(mixed, tiny_data):
    captions = {clean_caption(row["caption"]) for row in json.loads((tiny_data / "tiny_train.json").read_text())}
    demo = TextEncoder("demo", "mean")
    for name in ("iteration_000000", "iteration_000002", "last", "best"):
        synset = load_synset(mixed / f"{name}.safetensors")
        assert set(synset.sentences.sentences) <= captions
        assert torch.allclose(embedded(synset, demo), synset.text_syn, atol=1e-5)
    assert {len(text) for text in load_synset(mixed / "last.safetensors").sentences.texts()} == {3}
    first = load_synset(mixed / "iteration_000000.safetensors")
    assert [[sentence for sentence, _ in text] for text in first.sentences.texts()] == [[c] for c in first.captions]
    assert first.sentences.weights.flatten().tolist() == pytest.approx([1] * 6)


def test_the_page_shows_what_texts_are_made_of(mixed):
    page = (mixed / "report.html").read_text()
    text = load_synset(mixed / "best.safetensors").sentences.texts()[0]
    shown = page[page.index("Largest of the text&#39;s 3 sentences") :].partition("</article>")[0]
    assert [shown.index(sentence) for sentence, _ in text] == sorted(shown.index(sentence) for sentence, _ in text)
    assert all(f"{weight:.2f}</data>" in shown for _, weight in text)
    assert "A text is a sum of at most 3 sentences with weights." in page


@pytest.mark.parametrize("more", [[], ["--ema_decay", 0.5, "--optimizer", "adam", "--lr_txt", 0.1, "--text_only"]])
def test_a_resumed_run_goes_on_exactly(run_distill, tmp_path, more):
    assert run_distill(tmp_path / "a", *MIXTURE, *QUICK, *more, "--Iteration", 5) == 0
    assert run_distill(tmp_path / "b", *MIXTURE, *QUICK, *more, "--Iteration", 3) == 0
    assert run_distill(tmp_path / "b", *MIXTURE, *QUICK, *more, "--Iteration", 5, "--resume") == 0
    a, b = (load_synset(tmp_path / name / "last.safetensors") for name in "ab")
    assert torch.equal(a.text_syn, b.text_syn) and torch.equal(a.image_syn, b.image_syn)
    assert a.sentences.texts() == b.sentences.texts()


@pytest.fixture
def free(straight, run_distill, tmp_path):
    """A set of free texts far from sentences."""
    synset = load_synset(straight / "last.safetensors")
    synset.text_syn = synset.text_syn + 0.3 * normal(0, *synset.text_syn.shape).float() * synset.text_syn.std()
    save_synset(tmp_path / "free.safetensors", synset)
    return tmp_path / "free.safetensors"


def test_a_saved_text_is_the_pursuit_of_the_free_one(run_distill, free, tmp_path):
    assert run_distill(tmp_path / "a", *MIXTURE, *QUICK, "--Iteration", 0, "--init_set", free) == 0
    synset = load_synset(tmp_path / "a/last.safetensors")
    captions = list(dict.fromkeys(load_captions(synset.settings)))
    atoms = TextEncoder("demo", "mean").encode(captions).double().numpy()
    for made_of, text in zip(synset.sentences.texts(), load_synset(free).text_syn.double().numpy(), strict=True):
        taken, weights = brute_force(text, atoms, 3)
        expected = {captions[i]: weight for i, weight in zip(taken, weights, strict=True)}
        assert dict(made_of) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_gradient_at_the_mixture_moves_the_free_text(run_distill, free, tmp_path):
    """The first step from free texts is the one that free texts take from where the mixtures are."""
    texts = [load_synset(free).text_syn]
    assert run_distill(tmp_path / "a", *MIXTURE, *QUICK, "--Iteration", 1, "--init_set", free) == 0
    texts.append(load_file(tmp_path / "a/state.safetensors")["text_syn"])
    mixtures = tmp_path / "a/iteration_000000.safetensors"
    texts.append(load_synset(mixtures).text_syn)
    assert run_distill(tmp_path / "b", "--no_draw", *QUICK, "--Iteration", 1, "--init_set", mixtures) == 0
    texts.append(load_synset(tmp_path / "b/last.safetensors").text_syn)
    step, expected = texts[1] - texts[0], texts[3] - texts[2]
    assert (texts[0] - texts[2]).norm() > 10 * step.norm() > 0
    assert torch.allclose(step, expected, atol=0.01 * expected.abs().max().item())
    a, b = (load_synset(tmp_path / name / "last.safetensors") for name in "ab")
    assert torch.allclose(a.image_syn, b.image_syn, atol=1e-6)
    assert (a.syn_lr_img, a.syn_lr_txt) == pytest.approx((b.syn_lr_img, b.syn_lr_txt))


def load_captions(settings):
    with open(f"{settings['ann_root']}/tiny_train.json") as file:
        return [clean_caption(row["caption"]) for row in json.load(file)]


def test_sentences_of_a_file(run_distill, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("circle\nred box\nstar\nheart\na blue wall\nball.", encoding="utf-8")
    argv = ["--txt_words", tmp_path / "words.txt", "--Iteration", 2]
    assert run_distill(tmp_path / "r", *MIXTURE, *QUICK, *argv) == 0
    assert f"at most 3 of 6 sentences, {tmp_path / 'words.txt'}" in capsys.readouterr().out
    for name in ("iteration_000000", "last"):
        synset = load_synset(tmp_path / f"r/{name}.safetensors")
        assert set(synset.sentences.sentences) <= set(read_sentences(tmp_path / "words.txt"))
        assert torch.allclose(embedded(synset, TextEncoder("demo", "mean")), synset.text_syn, atol=1e-5)
    export_sets(tmp_path / "f", {"set": synset})
    assert str(tmp_path) not in (tmp_path / "f/set.json").read_text()


def test_captions_are_drawn_if_there_are_many(run_distill, tmp_path, capsys, monkeypatch):
    """Those of the first pairs among them, and others by the seed."""
    monkeypatch.setattr(dictionary, "MOST_CAPTIONS", 20)
    drawn = []
    for seed in (0, 0, 1):
        folder = tmp_path / f"{len(drawn)}"
        argv = ["--txt_terms", 20, "--Iteration", 1, "--init_set", tmp_path / "0/iteration_000000.safetensors"]
        argv = argv if drawn else argv[:-2]
        assert run_distill(folder, *MIXTURE, *QUICK, *argv, "--seed", seed) == 0
        assert "at most 20 of 20 sentences, drawn from the 1" in capsys.readouterr().out
        first = load_synset(folder / "iteration_000000.safetensors")
        assert [[s for s, _ in text] for text in first.sentences.texts()] == [[c] for c in first.captions]
        drawn.append(set(load_synset(folder / "last.safetensors").sentences.sentences))
    assert drawn[0] == drawn[1] != drawn[2] and all(len(sentences) == 20 for sentences in drawn)


# ---- with mixtures of pictures


def test_pictures_and_texts_are_both_mixtures(tiny_argv, tmp_path):
    heads = ["--image_trainable", "False", "--only_has_image_projection"]
    argv = [*tiny_argv, *QUICK_BUFFER, *heads, "--num_experts", "1", "--buffer_path", str(tmp_path / "b")]
    assert buffer.main(argv) == 0
    pictures = ["--pix_param", "mixture", "--pix_words", "10", "--optimizer", "adam", "--lr_img", "0.01"]
    argv = [*tiny_argv, *QUICK_DISTILL, *heads, *MIXTURE, *pictures, "--buffer_path", str(tmp_path / "b")]
    assert distill.main([*argv, "--save_dir", str(tmp_path / "r"), "--Iteration", "2", "--no_report"]) == 0
    synset = load_synset(tmp_path / "r/last.safetensors")
    assert synset.mixture and torch.allclose(embedded(synset, TextEncoder("demo", "mean")), synset.text_syn, atol=1e-5)
    export_sets(tmp_path / "f", {"set": synset})
    read = load_synset(tmp_path / "f")
    assert read.sentences.texts() == synset.sentences.texts()
    assert torch.equal(read.mixture.weights, synset.mixture.weights)


# ---- other text encoders, folders


def test_another_text_encoder_gives_its_own_embeddings(mixed, save_bert, trained_on, tmp_path, capsys):
    """Of a file and of a folder; no map is fitted, and the set's own text encoder need not be here."""
    bert = save_bert(tmp_path / "bert")
    synset = load_synset(mixed / "last.safetensors")
    synset.settings["text_encoder"] = str(tmp_path / "gone")
    save_synset(tmp_path / "s.safetensors", synset)
    export_sets(tmp_path / "f", {"set": synset})
    sets = [tmp_path / "s.safetensors", tmp_path / "f"]
    places = [f"--{key}={synset.settings[key]}" for key in ("image_root", "ann_root", "image_checkpoint")]
    numbers = tmp_path / "t.json"
    assert score_sets("--synset", *sets, *places, "--text_encoder", bert, *QUICK, "--json", numbers) == 0
    out = capsys.readouterr().out
    assert f"its {len(synset.sentences.sentences)} sentences embedded by {bert}" in out and "linear map" not in out
    expected = embedded(synset, TextEncoder(bert, "mean"))
    assert expected.shape == (6, 16)
    for used in trained_on:
        assert torch.allclose(used.text_syn, expected, atol=1e-5) and used.texts == "mixed"
    assert [row["texts"] for row in json.loads(numbers.read_text())["rows"]] == ["mixed"] * 2
    assert "sentences embedded anew" in out


def test_its_own_text_encoder_gets_the_texts_as_they_are(mixed, trained_on):
    assert score_sets("--synset", mixed / "last.safetensors", *QUICK) == 0
    assert torch.equal(trained_on[0].text_syn, load_synset(mixed / "last.safetensors").text_syn)
    assert trained_on[0].texts == "learned"


def test_a_folder_holds_the_sentences_of_each_pair(mixed, tmp_path):
    synset = load_synset(mixed / "last.safetensors")
    export_sets(tmp_path / "f", {"set": synset})
    lines = [json.loads(line) for line in (tmp_path / "f/metadata.jsonl").open()]
    assert [list(zip(line["sentences"], line["weights"], strict=True)) for line in lines] == synset.sentences.texts()
    read = load_synset(tmp_path / "f")
    assert read.sentences.sentences == synset.sentences.sentences
    assert torch.equal(read.sentences.rows, synset.sentences.rows)
    assert torch.equal(read.sentences.weights, synset.sentences.weights)
    assert torch.equal(read.text_syn, synset.text_syn)
    export_sets(tmp_path / "g", {"set": replace(read, sentences=None)})
    assert "sentences" not in (tmp_path / "g/metadata.jsonl").read_text()
    assert "weighted sum" in (tmp_path / "f/README.md").read_text()
    assert "weighted sum" not in (tmp_path / "g/README.md").read_text()


# ---- wrong input


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image_only"], ["--image_only"]),
        (["--txt_init", "noise"], ["--txt_init noise"]),
        (["--txt_terms", 200], ["--txt_terms 200", "the training captions"]),
        (["--txt_words", "nowhere.txt"], ["nowhere.txt", "cannot read"]),
        (["--txt_param", "embeddings", "--txt_words", "x"], ["--txt_words", "--txt_param mixture"]),
    ],
)
def test_what_cannot_be(run_distill, tmp_path, capsys, more, words):
    line = error_line(capsys, run_distill, tmp_path / "x", *MIXTURE, *more)
    assert all(word in line for word in words), line
    assert not (tmp_path / "x").exists()


def test_a_run_is_not_resumed_with_other_sentences(run_distill, mixed, capsys):
    argv = [*MIXTURE, "--ema_decay", 0.5, "--resume", "--Iteration", 5]
    line = error_line(capsys, run_distill, mixed, *argv, "--txt_terms", 4)
    assert "txt_terms=3" in line
    line = error_line(capsys, run_distill, mixed, "--ema_decay", 0.5, "--resume", "--Iteration", 5)
    assert "txt_param=mixture" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": torch.full((6, 3), 99)}, "not those of 6 texts"),
        ({"rows": torch.zeros(5, 3, dtype=torch.int64), "weights": torch.ones(5, 3)}, "not those of 6 texts"),
        ({"weights": torch.ones(6, 2)}, "do not fit"),
        ({"weights": torch.full((6, 3), torch.nan)}, "not finite"),
        ({"sentences": ["a", 1]}, "not a list of texts"),
        ({"sentences": None}, "not a list of texts"),
    ],
)
def test_files_whose_sentences_do_not_fit(mixed, tmp_path, change, words):
    synset = load_synset(mixed / "last.safetensors")
    synset.sentences = replace(synset.sentences, **change)
    save_synset(tmp_path / "s.safetensors", synset)
    line = input_error(load_synset, tmp_path / "s.safetensors")
    assert str(tmp_path / "s.safetensors") in line and words in line and "make it again" in line


def test_folders_whose_sentences_do_not_fit(mixed, tmp_path):
    export_sets(tmp_path / "f", {"set": load_synset(mixed / "last.safetensors")})
    path = tmp_path / "f/metadata.jsonl"
    lines = path.read_text().splitlines()
    for change in ({"weights": [1.0]}, {"sentences": "a"}, {"sentences": [1, 2, 3]}, {"weights": ["a", "b", "c"]}):
        path.write_text("\n".join([lines[0], json.dumps({**json.loads(lines[1]), **change}), *lines[2:]]))
        line = input_error(load_synset, tmp_path / "f")
        assert "metadata.jsonl" in line and "pair 2" in line and "export the set again" in line
