"""Fixtures that the tests share: a tiny data set, its experts, runs; charts that are sketched."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from matplotlib.figure import Figure

import buffer
import distill
import evaluate
from data.demo import make_demo
from networks.text_encoder import SHORT_NAMES
from tests.conftest import ENCODER_WEIGHTS, QUICK_BUFFER, QUICK_DISTILL
from utils.report import charts, write_run_page

torch.set_num_threads(1)  # more only slow networks this small down


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder of the data set "tiny": drawn scenes of 32 px, 24 / 8 / 8, five captions each."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    make_demo(root, num_train=24, num_val=8, num_test=8, image_size=32)
    for split in ("train", "val", "test"):
        (root / f"demo_{split}.json").rename(root / f"tiny_{split}.json")
    return root


@pytest.fixture(scope="session")
def tiny_argv(tiny_data, tmp_path_factory):
    """Flags all scripts take for the data set "tiny" and the encoders of the demo; later flags override them."""
    return [
        *("--dataset", "tiny", "--image_root", str(tiny_data), "--ann_root", str(tiny_data), "--image_size", "32"),
        *("--image_encoder", "test_nfnet", "--image_checkpoint", str(ENCODER_WEIGHTS), "--text_encoder", "demo"),
        *("--text_pooling", "mean", "--num_workers", "0", "--device", "cpu"),
        *("--cache_dir", str(tmp_path_factory.mktemp("cache"))),
    ]


@pytest.fixture(scope="session")
def run_buffer(tiny_argv):
    def run(folder, *more):
        return buffer.main([*tiny_argv, *QUICK_BUFFER, "--buffer_path", str(folder), *map(str, more)])

    return run


@pytest.fixture(scope="session")
def experts(run_buffer, tmp_path_factory):
    """Buffer folder with two experts of two epochs."""
    folder = tmp_path_factory.mktemp("buffer")
    assert run_buffer(folder, "--num_experts", 2) == 0
    return folder


@pytest.fixture(scope="session")
def run_distill(tiny_argv, experts):
    def run(save_dir, *more):
        """Without a report, unless --report is among `more`."""
        argv = [*tiny_argv, *QUICK_DISTILL, "--buffer_path", str(experts), "--save_dir", str(save_dir)]
        report = [] if "--report" in more else ["--no_report"]
        return distill.main([*argv, *report, *map(str, more)])

    return run


RENDER = charts.svg


def sketch(name: str, alt: str, draw, size=charts.SIZE) -> str:
    """What stands for a chart: drawn on its axes, but not rendered, which takes a third of a second."""
    draw(Figure(figsize=size, layout="constrained").add_subplot())
    return charts._for_page('<svg viewBox="0 0 1 1"></svg>', name, alt)


@pytest.fixture(scope="session", autouse=True)
def sketches():
    """The charts of all pages but those of `rendered` and `straight` are no more than what they tell."""
    charts.svg = sketch
    yield
    charts.svg = RENDER


@pytest.fixture
def rendered(monkeypatch):
    """Charts are rendered."""
    monkeypatch.setattr(charts, "svg", RENDER)


@pytest.fixture(scope="session")
def straight(run_distill, tmp_path_factory):
    """Run folder of four iterations, with a report; its charts are rendered once, at the end."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert run_distill(folder, "--Iteration", 4, "--report") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "svg", RENDER)
        write_run_page(folder)
    return folder


@pytest.fixture(scope="session")
def save_bert():
    """Writes a BERT of 16 features with the vocabulary of the demo; gives the folder's name."""

    def save(folder, seed=5):
        folder.mkdir()
        for name in ("vocab.txt", "tokenizer_config.json"):
            shutil.copy(Path(SHORT_NAMES["demo"]) / name, folder)
        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        torch.manual_seed(seed)
        config = transformers.BertConfig(vocab_size=134, max_position_embeddings=80, initializer_range=0.2, **size)
        transformers.BertModel(config).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def metrics():
    """The lines of a run folder's metrics.jsonl."""
    return lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def trained_on(monkeypatch):
    """The sets that evaluate.py trains networks on."""
    seen, score = [], evaluate.score
    monkeypatch.setattr(
        evaluate, "score", lambda synset, *args, looks: seen.append(synset) or score(synset, *args, looks)
    )
    return seen
