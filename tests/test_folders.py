"""Sets as folders: what is written for any program, read back, and scored as their files are."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.transforms.functional import pil_to_tensor

import evaluate
from data.annotations import clean_caption
from networks.text_encoder import TextEncoder
from tests.conftest import ENCODER_WEIGHTS
from tests.programs import error_line, input_error, score_sets
from utils.forms import Mixture, as_words
from utils.sets import SynSet, export_sets, load_synset, save_synset
from utils.sets.folders import LEFT_OUT, PATHS, without_paths

QUICK = ["--num_eval", "2", "--epoch_eval_train", "3"]
EXACT = [
    *("syn_lr_img", "syn_lr_txt", "captions", "mean", "std", "files", "scores", "alpha", "loss_type", "phases", "rates")
]


@pytest.fixture
def synset():
    """Six pairs with soft targets, phases and rates of two encoders; its pixels are in the range of a picture."""
    generator = torch.Generator().manual_seed(3)
    mean, std = torch.tensor([(0.5, 0.4, 0.3), (0.2, 0.3, 0.4)]).view(2, 3, 1, 1)
    return SynSet(
        image_syn=(torch.rand(6, 3, 8, 12, generator=generator) - mean) / std,
        text_syn=torch.randn(6, 5, generator=generator),
        syn_lr_img=0.012345678,
        syn_lr_txt=0.3,
        captions=["a dog", "größer", "two\u2028lines", "", '"quoted" {braces}', "back\\slash"],
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        settings={"method": "distilled", "iteration": 7, "epoch_eval_train": 9, "batch_train": 4, "temperature": 0.1},
        files=["a/1.jpg", "2.jpg"],
        scores=[0.1, 2.0],
        similarity=tuple(torch.randn(*shape, generator=generator) for shape in ((6,), (6, 2), (6, 2))),
        alpha=3.0,
        loss_type="WBCE",
        phases=2,
        rates={"a": [0.01, 0.2], "timm/b": [0.02, 0.4]},
    )


@pytest.fixture
def mixture(synset):
    """Six mixtures of nine pictures."""
    generator = torch.Generator().manual_seed(4)
    words = as_words(torch.randint(0, 256, (9, 3, 8, 12), dtype=torch.uint8, generator=generator))
    return replace(synset, mixture=Mixture(torch.randn(6, 9, generator=generator).half().float(), words))


def exported(folder, synset):
    export_sets(folder, {"set": synset})
    return load_synset(folder)


def check_same(read, synset):
    """All but the pixels is equal, whatever is left out of the settings."""
    for key in EXACT:
        assert getattr(read, key) == getattr(synset, key), key
    assert torch.equal(read.text_syn, synset.text_syn)
    assert len(read.similarity) == len(synset.similarity)
    assert all(map(torch.equal, read.similarity, synset.similarity))
    kept = {key: value for key, value in synset.settings.items() if key not in read.settings[LEFT_OUT]}
    new = LEFT_OUT, "text_encoder", "image_weights"
    assert {key: value for key, value in read.settings.items() if key not in new} == {
        key: value for key, value in kept.items() if key != "text_encoder"
    }


def check_pixels(read, synset):
    shown = [
        s.image_syn * torch.tensor(s.std).view(3, 1, 1) + torch.tensor(s.mean).view(3, 1, 1) for s in (read, synset)
    ]
    assert (shown[0] - shown[1].clamp(0, 1)).abs().max() <= 1 / 510 + 1e-6


# ---- there and back


def test_soft_targets_phases_and_rates_come_back(tmp_path, synset):
    read = exported(tmp_path / "f", synset)
    check_same(read, synset)
    check_pixels(read, synset)
    assert read.settings == {**synset.settings, LEFT_OUT: {}}
    again = exported(tmp_path / "g", read)
    assert torch.equal(again.image_syn, read.image_syn)
    for name in ("set.json", "texts.safetensors", "metadata.jsonl", "README.md"):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "g" / name).read_bytes()


def test_a_mixture_comes_back_with_its_pictures_as_they_were(tmp_path, mixture):
    read = exported(tmp_path / "f", mixture)
    check_same(read, mixture)
    assert torch.equal(read.mixture.weights, mixture.mixture.weights)
    assert [word.tolist() for word in read.mixture.words] == [word.tolist() for word in mixture.mixture.words]
    files = sorted((tmp_path / "f/words").iterdir())
    assert [path.read_bytes() for path in files] == [bytes(word.tolist()) for word in mixture.mixture.words]
    save_synset(tmp_path / "s", mixture)
    assert torch.equal(read.image_syn, load_synset(tmp_path / "s").image_syn)
    assert len(list((tmp_path / "f").glob("*.png"))) == 6
    about = json.loads((tmp_path / "f/set.json").read_text())
    assert (about["pairs"], about["pictures"]) == (6, 9)


def test_a_distilled_set_comes_back_without_paths(straight, tmp_path, tiny_argv):
    synset = load_synset(straight / "last.safetensors")
    read = exported(tmp_path / "f", synset)
    check_same(read, synset)
    check_pixels(read, synset)
    assert set(read.settings[LEFT_OUT]) == {"image_root", "ann_root", "buffer_path", "save_dir", "cache_dir"} | {
        "image_checkpoint"
    }
    texts = "".join(
        path.read_text() for path in (tmp_path / "f").iterdir() if path.suffix not in (".png", ".safetensors")
    )
    with safe_open(tmp_path / "f/texts.safetensors", "pt") as file:
        texts += json.dumps(file.metadata())
    for path in (tmp_path, straight.parent, ENCODER_WEIGHTS.parent, *(a for a in tiny_argv if a.startswith("/"))):
        assert str(path) not in texts
    assert "/" not in json.dumps(read.settings).replace("1/", "")


def test_settings_lose_paths_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/bert").mkdir(parents=True)
    names = {"image_encoder": ["timm/a", "hf-hub:b/c"], "lora_layers": ".*attn.*|x/y", "init_set": None, "coreset": []}
    paths = {"image_checkpoint": ["none", "weights/b.pt"], "save_dir": "runs/x", "coreset": ["c.safetensors"]}
    kept = without_paths({**names, "text_encoder": "google/bert", "image_checkpoint": None, "device": "cuda:0"})
    assert kept == {**names, "text_encoder": "google/bert", "image_checkpoint": None, "device": "cuda:0", LEFT_OUT: {}}
    cut = without_paths({**paths, "text_encoder": "own/bert/", "image_kwargs": {"file": "/home/x/y.bin", "n": 3}})
    left_out = {"image_checkpoint": ["none", "b.pt"], "save_dir": None, "coreset": None}
    kwargs = {"file": "y.bin", "n": 3}
    assert cut == {
        "text_encoder": "bert",
        "image_kwargs": kwargs,
        LEFT_OUT: {**left_out, "text_encoder": "bert", "image_kwargs": kwargs},
    }
    assert without_paths(cut) == cut
    assert all(LEFT_OUT in without_paths({key: r"C:\Users\x"}) for key in PATHS)
    assert without_paths({"name": r"C:\Users\x"})["name"] == "x"


def test_texts_of_a_run_that_began_with_a_set_are_no_captions(tmp_path, synset):
    synset.settings |= {"method": "initial", "init_set": "x/set.safetensors"}
    assert not synset.texts_are_captions and not exported(tmp_path / "f", synset).texts_are_captions


# ---- scored


def recall(tmp_path, *argv):
    assert score_sets("--synset", *argv, *QUICK, "--json", tmp_path / "t.json") == 0
    return [row["mean"]["r_mean"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]]


@pytest.fixture
def folder(straight, tmp_path):
    assert score_sets("--synset", straight / "last.safetensors", "--export", tmp_path / "set") == 0
    return tmp_path / "set"


@pytest.fixture
def places(tiny_data):
    return ["--image_root", tiny_data, "--ann_root", tiny_data, "--image_checkpoint", ENCODER_WEIGHTS]


def test_a_folder_scores_as_its_file(straight, folder, places, tmp_path):
    of_file, of_folder = recall(tmp_path, straight / "last.safetensors", folder, *places)
    assert recall(tmp_path, folder, *places) == [of_folder]
    assert abs(of_file - of_folder) < 3, (of_file, of_folder)
    numbers = json.loads((tmp_path / "t.json").read_text())["rows"][0]
    assert numbers["method"] == "distilled" and numbers["texts"] == "learned"


def test_a_page_shows_a_folder(folder, places, tmp_path):
    assert recall(tmp_path, folder, *places, "--report", tmp_path / "r.html")
    assert str(tmp_path) not in (tmp_path / "r.html").read_text()


def test_what_a_folder_left_out_is_asked_for(folder, places, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, score_sets, "--synset", folder, *places[:4])
    assert "demo_nfnet.safetensors" in line and "--image_checkpoint" in line
    line = error_line(capsys, score_sets, "--synset", folder, *places[4:])
    assert str(folder) in line and "--image_root" in line
    (tmp_path / "pictures").mkdir()
    line = error_line(capsys, score_sets, "--synset", folder, places[0], tmp_path / "pictures", *places[4:])
    assert "--ann_root" in line


def test_a_text_encoder_in_a_folder_is_asked_for_and_known(straight, places, save_bert, tmp_path, capsys):
    bert = save_bert(tmp_path / "own_bert")
    synset = load_synset(straight / "last.safetensors")
    synset.settings["text_encoder"], synset.text_syn = bert, torch.randn(6, 16)
    save_synset(tmp_path / "s.safetensors", synset)
    assert score_sets("--synset", tmp_path / "s.safetensors", "--export", tmp_path / "f") == 0
    assert load_synset(tmp_path / "f").settings["text_encoder"] == "own_bert"
    line = error_line(capsys, score_sets, "--synset", tmp_path / "f", *places)
    assert "own_bert" in line and "--text_encoder" in line
    of_file, of_folder = recall(tmp_path, tmp_path / "s.safetensors", tmp_path / "f", *places, "--text_encoder", bert)
    assert abs(of_file - of_folder) < 3
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["texts"] for row in rows] == ["learned"] * 2


def test_the_demo_is_found_without_paths(folder, monkeypatch):
    about = json.loads((folder / "set.json").read_text())
    about["settings"]["dataset"] = "demo"
    (folder / "set.json").write_text(json.dumps(about))
    args = evaluate.parse_args(["--synset", str(folder)])
    (own,) = evaluate.encoder_args(args, [load_synset(folder)]).values()
    assert own.image_checkpoint == str(ENCODER_WEIGHTS) and args.image_root == "demo_data"


def test_distillation_starts_from_a_folder(straight, folder, run_distill, tmp_path):
    assert run_distill(tmp_path / "r", "--Iteration", 0, "--init_set", folder, "--no_draw") == 0
    start, given = load_synset(tmp_path / "r/iteration_000000.safetensors"), load_synset(straight / "last.safetensors")
    assert torch.equal(start.text_syn, given.text_syn)
    check_pixels(start, given)


# ---- pictures with captions of another program


@pytest.fixture
def captioned(tiny_data, tmp_path):
    """Six real pairs, of JPEG and PNG files."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    rows = json.loads((tiny_data / "tiny_train.json").read_text())[::5][:6]
    lines = []
    for i, row in enumerate(rows):
        name = f"{i:04d}.{'jpg' if i % 2 else 'png'}"
        Image.open(tiny_data / row["image"]).convert("L" if i == 2 else "RGB").save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": row["caption"].upper() + "."}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def encoders(tiny_argv):
    return [*tiny_argv[: tiny_argv.index("--num_workers")], "--device", "cpu"]


RATES = ["--syn_lr_img", "0.01", "--syn_lr_txt", "0.1"]


def test_captions_of_another_program_are_embedded(captioned, encoders, straight, tmp_path, monkeypatch):
    seen, score = [], evaluate.score
    monkeypatch.setattr(evaluate, "score", lambda synset, *a, **k: seen.append(synset) or score(synset, *a, **k))
    assert recall(tmp_path, captioned, *encoders, *RATES, "--report", tmp_path / "r.html")
    (row,) = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert (row["method"], row["texts"], row["rates"]) == ("pictures with captions", "captions", [0.01, 0.1])
    text_encoder = TextEncoder("demo", "mean")
    captions = [clean_caption(json.loads(line)["text"]) for line in (captioned / "metadata.jsonl").open()]
    assert torch.allclose(seen[0].text_syn, text_encoder.encode(captions), atol=1e-5)
    with Image.open(captioned / "0000.png") as picture:
        assert torch.equal((seen[0].image_syn[0] * 255).round().byte(), pil_to_tensor(picture))
    argv = [captioned, straight / "last.safetensors", *encoders, "--tune_rates", "--grid_img", 0.02, "--grid_txt", 0.2]
    assert len(recall(tmp_path, *argv)) == 2


def test_captioned_pictures_do_not_stand_for_a_set(captioned, encoders, run_distill, tmp_path, capsys):
    line = error_line(capsys, score_sets, "--synset", captioned, *encoders, "--syn_lr_img", 0.1)
    assert str(captioned) in line and "--syn_lr_txt" in line and "--tune_rates" in line
    line = error_line(capsys, score_sets, "--synset", captioned, "--export", tmp_path / "x")
    assert str(captioned) in line and not (tmp_path / "x").exists()
    line = error_line(capsys, run_distill, tmp_path / "r", "--Iteration", 0, "--init_set", captioned, "--no_draw")
    assert str(captioned) in line and "without embeddings" in line
    Image.new("RGB", (9, 9)).save(captioned / "0003.jpg")
    assert "one size" in error_line(capsys, score_sets, "--synset", captioned, *encoders, *RATES)
    (captioned / "metadata.jsonl").write_text("")
    assert str(captioned) in error_line(capsys, score_sets, "--synset", captioned, *encoders, *RATES)


# ---- wrong folders


def test_a_mixture_without_one_of_its_pictures(tmp_path, mixture):
    export_sets(tmp_path / "f", {"set": mixture})
    word = tmp_path / "f/words/000007.jpg"
    word.write_bytes(word.read_bytes()[:30])
    assert "picture 7" in input_error(load_synset, tmp_path / "f")
    word.write_bytes(b"")
    assert str(word) in input_error(load_synset, tmp_path / "f")
    word.unlink()
    assert str(word) in input_error(load_synset, tmp_path / "f")


def test_a_run_folder_names_its_set(straight, tmp_path, capsys):
    line = error_line(capsys, score_sets, "--synset", straight)
    assert f"give {straight / 'best.safetensors'}" in line
    shutil.copytree(straight, tmp_path / "run.pt")
    assert "best.safetensors" in error_line(capsys, score_sets, "--synset", tmp_path / "run.pt")
