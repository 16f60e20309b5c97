"""Sets in the form of LoRS, RepBlend and PTM-ST: read, evaluated and written back as they were."""

import json
import os
import pickle

import pytest
import torch

import evaluate
from tests.programs import error_line, score_sets
from utils.report.run import read_coresets
from utils.sets import load_synset, save_synset
from utils.sets.released import MEAN, STD, find_alpha

QUICK = ["--num_eval", "1", "--epoch_eval_train", "1"]


def released(sim_type="lowrank", alpha=3.0, rank=2, pairs=6, text_dim=312):
    """What LoRS saves, its similarity written out."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    stored = {"image": normal(pairs, 3, 32, 32), "text": normal(pairs, text_dim)}
    stored |= {"syn_lr_img": torch.tensor(0.02), "syn_lr_txt": torch.tensor(0.3)}
    if sim_type == "full":
        matrix = torch.eye(pairs) + 0.1 * normal(pairs, pairs)
        return {**stored, "similarity_params": [matrix], "similarity_mat": matrix.clone()}
    diagonal, left, right = 1 + 0.1 * normal(pairs), normal(pairs, rank), 0.1 * normal(pairs, rank)
    matrix = torch.zeros(pairs, pairs)
    for i in range(pairs):
        for j in range(pairs):
            product = sum(left[i, k] * right[j, k] for k in range(rank))
            matrix[i, j] = (diagonal[i] if i == j else 0) + alpha / rank * product
    return {**stored, "similarity_params": [diagonal, left, right], "similarity_mat": matrix}


@pytest.fixture(scope="module")
def text_dim(straight):
    """The width of the demo's text encoder."""
    return load_synset(straight / "last.safetensors").text_syn.shape[1]


@pytest.fixture
def save(tmp_path):
    def write(stored, name="distilled_2000.pt"):
        torch.save(stored, tmp_path / name)
        return str(tmp_path / name)

    return write


def same(left, right, atol=0.0):
    return left.shape == right.shape and left.dtype == right.dtype and torch.allclose(left, right, rtol=0, atol=atol)


@pytest.mark.parametrize("sim_type", ["lowrank", "full"])
def test_file_is_read_and_written_back_unchanged(save, tmp_path, sim_type, monkeypatch):
    stored = released(sim_type)
    path = save(stored)
    synset = load_synset(path)
    assert torch.equal(synset.image_syn, stored["image"]) and torch.equal(synset.text_syn, stored["text"])
    assert (synset.syn_lr_img, synset.syn_lr_txt) == pytest.approx((0.02, 0.3))
    assert (synset.mean, synset.std, synset.loss_type) == (MEAN, STD, "WBCE")
    assert synset.alpha == (3.0 if sim_type == "lowrank" else 1.0)
    assert torch.allclose(synset.targets, stored["similarity_mat"], atol=1e-6)
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--synset", path, "--export_pt", "new/back.pt"]) == 0
    back = torch.load(tmp_path / "new/back.pt", weights_only=True)
    assert os.listdir(tmp_path / "new") == ["back.pt"] and back.keys() == stored.keys()
    for left, right in zip(back.pop("similarity_params"), stored.pop("similarity_params"), strict=True):
        assert same(left, right)
    # Of a lowrank similarity the matrix is made again, in another order of summation than in this test.
    assert same(back.pop("similarity_mat"), stored.pop("similarity_mat"), atol=1e-6)
    assert all(same(back[key], value) for key, value in stored.items())


@pytest.mark.parametrize("alpha", [0.01, 1.0, 3.0, 12.5])
def test_alpha_is_found_from_matrix_and_parts(alpha):
    stored = released(alpha=alpha, pairs=40, rank=5)
    assert find_alpha(stored["similarity_params"], stored["similarity_mat"]) == alpha
    stored["similarity_mat"][3, 4] += 0.01
    assert find_alpha(stored["similarity_params"], stored["similarity_mat"]) is None


def test_matrix_that_the_parts_do_not_give_stands_for_itself(save):
    stored = released()
    stored["similarity_mat"] = torch.rand(6, 6)
    synset = load_synset(save(stored))
    assert torch.equal(synset.targets, stored["similarity_mat"]) and len(synset.similarity) == 1
    del stored["similarity_params"]
    assert torch.equal(load_synset(save(stored)).targets, stored["similarity_mat"])


def test_untrained_similarity(save):
    """With R = 0 no α can be found and none is needed."""
    stored = released()
    diagonal, _, right = stored["similarity_params"]
    diagonal.fill_(1.0), right.zero_()
    stored["similarity_mat"] = torch.eye(6)
    synset = load_synset(save(stored))
    assert torch.equal(synset.targets, torch.eye(6)) and len(synset.similarity) == 3


def test_without_similarity_targets_are_hard(save):
    stored = {key: value for key, value in released().items() if not key.startswith("similarity")}
    synset = load_synset(save(stored))
    assert (synset.targets, synset.loss_type) == (None, "InfoNCE")


@pytest.fixture
def trained_on(monkeypatch):
    """The sets that networks are trained on, and with which encoders."""
    seen, score = [], evaluate.score
    monkeypatch.setattr(
        evaluate, "score", lambda synset, *more, looks: seen.append((synset, more[-1])) or score(synset, *more, looks)
    )
    return seen


def test_file_is_evaluated_with_the_flags_alone(save, straight, text_dim, tiny_argv, tmp_path, trained_on, capsys):
    """First in its table it inherits nothing; beside a set of ours it takes that one's data and encoders."""
    stored = released(text_dim=text_dim)
    path, files = save(stored), ["--json", str(tmp_path / "t.json"), "--report", str(tmp_path / "r.html")]
    assert evaluate.main(["--synset", path, *QUICK, *tiny_argv, *files]) == 0
    (row,) = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert row["rates"] == pytest.approx([0.02, 0.3]) and (row["pairs"], row["method"]) == (6, "distilled elsewhere")
    assert row["loss_type"] == "WBCE"
    assert "distilled_2000 (distilled elsewhere, WBCE) | 6 | test_nfnet" in capsys.readouterr().out
    assert "distilled elsewhere" in (tmp_path / "r.html").read_text()
    ours = str(straight / "last.safetensors")
    assert evaluate.main(["--synset", ours, path, *QUICK, "--loss_type", "NCE", "--syn_lr_img", "0.05"]) == 0
    (first, args), (own, _), (second, of_second) = trained_on
    assert (first.loss_type, own.loss_type, second.loss_type) == ("WBCE", "NCE", "NCE")
    assert torch.allclose(second.targets, stored["similarity_mat"], atol=1e-6) and second.syn_lr_img == 0.05
    assert (args.dataset, of_second.dataset, args.batch_train, args.seed) == ("tiny", "tiny", 64, 0)


def test_distillation_reads_the_form(save, run_distill, text_dim, tmp_path, capsys):
    """To compare with in a report; as a start only for an encoder of the same mean and std, which the demo's is not."""
    path = save(released(text_dim=text_dim))
    assert read_coresets([path], text_dim)[path].loss_type == "WBCE"
    line = error_line(capsys, run_distill, tmp_path / "run", "--init_set", path)
    assert f"{path} does not fit: its mean and std is {(MEAN, STD)}" in line


def test_demo_data_are_named_by_one_flag(save):
    """Then encoders, checkpoint and sizes are those of the demo."""
    args = evaluate.parse_args(["--synset", save(released()), "--dataset", "demo"])
    of_encoder = evaluate.encoder_args(args, [load_synset(args.synset[0])])["test_nfnet"]
    assert of_encoder.image_checkpoint.endswith("demo_nfnet.safetensors") and args.text_encoder == "demo"
    args = evaluate.parse_args(["--synset", save(released())])
    assert (args.image_encoder, args.dataset, args.image_size, args.text_encoder) == (["nfnet"], "flickr", 224, "bert")


def test_set_of_ours_in_that_form(straight, tmp_path):
    """Pixels change their normalisation; hard targets are the identity, and are hard ones again when read."""
    ours = load_synset(straight / "last.safetensors")
    ours.mean, ours.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    save_synset(tmp_path / "ours.safetensors", ours)
    file = tmp_path / "ours.pt"
    assert evaluate.main(["--synset", str(tmp_path / "ours.safetensors"), "--export_pt", str(file)]) == 0
    stored = torch.load(file, weights_only=True)
    assert torch.equal(stored["similarity_mat"], torch.eye(6)) and len(stored["similarity_params"]) == 1
    pixels = ours.image_syn * torch.tensor(ours.std).view(3, 1, 1) + torch.tensor(ours.mean).view(3, 1, 1)
    assert torch.allclose(
        (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), stored["image"]
    )
    back = load_synset(file)
    assert torch.equal(back.text_syn, ours.text_syn) and (back.targets, back.loss_type) == (None, "InfoNCE")
    assert (back.syn_lr_img, back.syn_lr_txt) == (ours.syn_lr_img, ours.syn_lr_txt)


def test_phases_have_no_place_in_that_form(straight, tmp_path, capsys):
    ours = load_synset(straight / "last.safetensors")
    ours.phases = 3
    save_synset(tmp_path / "ours.safetensors", ours)
    line = error_line(
        capsys, score_sets, "--synset", tmp_path / "ours.safetensors", "--export_pt", tmp_path / "ours.pt"
    )
    assert "no phases" in line and not (tmp_path / "ours.pt").exists()


# ---- what cannot be used: one line


class Code:
    def __reduce__(self):
        return os.mkdir, ("made_by_the_file",)


def broken(name):
    stored = released()
    w, left, right = stored["similarity_params"]
    changes = {
        "code": {"image": Code()},
        "no text": {"text": None},
        "list for a picture": {"image": [1.0, 2.0]},
        "flat pictures": {"image": torch.zeros(6, 3 * 32 * 32)},
        "scalar picture": {"image": torch.tensor(0.0)},
        "fewer texts": {"text": torch.zeros(5, 8)},
        "negative rate": {"syn_lr_img": torch.tensor(-0.1)},
        "larger matrix": {"similarity_mat": torch.eye(7)},
        "parts of other pairs": {"similarity_params": [w[:5], left[:5], right[:5]]},
        "ranks that differ": {"similarity_params": [w, left, right[:, :1]]},
        "two parts": {"similarity_params": [w, left]},
        "no matrix": {"similarity_mat": None},
        "not a number": {"similarity_mat": torch.full((6, 6), torch.nan), "similarity_params": ()},
        "words": {"similarity_params": "identity"},
    }
    return {key: value for key, value in (stored | changes[name]).items() if value is not None}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("code", "code or objects (posix.mkdir)"),
        ("no text", "lacks the tensor text"),
        ("list for a picture", "lacks the tensor image"),
        ("flat pictures", "image_syn is [6, 3072]"),
        ("scalar picture", "image_syn is []"),
        ("fewer texts", "6 pictures, 5 texts"),
        ("negative rate", "syn_lr_img is -0.1"),
        ("larger matrix", "(7, 7) for 6 pairs"),
        ("parts of other pairs", "(5,) (5, 2) (5, 2) for 6 pairs"),
        ("ranks that differ", "(6,) (6, 2) (6, 1) for 6 pairs"),
        ("two parts", "similarity"),
        ("no matrix", "similarity_mat"),
        ("not a number", "similarity is not made of finite floats"),
        ("words", "similarity"),
    ],
)
def test_file_that_is_no_such_set(save, tmp_path, capsys, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    path = save(broken(name))
    line = error_line(capsys, score_sets, "--synset", path, "--export_pt", "back.pt")
    assert words in line and path in line and os.listdir(tmp_path) == ["distilled_2000.pt"]


def test_file_that_is_damaged_missing_or_something_else(save, tmp_path, capsys):
    path = save(released())
    line = error_line(capsys, score_sets, "--synset", save([torch.zeros(2)], "list.pt"))
    assert "holds a list; it must be a dict" in line
    with open(path, "r+b") as file:
        file.truncate(3000)
    assert f"{path} is damaged" in error_line(capsys, score_sets, "--synset", path)
    for content in (b"no pickle", b"", pickle.dumps({"image": 1})):
        (tmp_path / "other.pt").write_bytes(content)
        assert "is damaged or no torch file" in error_line(capsys, score_sets, "--synset", tmp_path / "other.pt")
    assert "does not exist" in error_line(capsys, score_sets, "--synset", tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--texts", "nearest"], "no captions"),
        (["--export_pt", "back.safetensors"], "ends in .pt"),
        (["--export_pt", "back.pt", "--export", "folder"], "no --export beside it"),
        (["--export_pt", "back.pt", "--looks", "2"], "leave out --looks"),
        (["--export_pt", "distilled_2000.pt/back.pt"], "cannot write distilled_2000.pt/back.pt"),
    ],
)
def test_flags_that_do_not_go_with_the_form(save, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    path = save(released())
    assert words in error_line(capsys, score_sets, "--synset", path, *argv) and os.listdir(tmp_path) == [
        "distilled_2000.pt"
    ]
    if argv[-1] == "back.pt":
        assert "takes one set" in error_line(capsys, score_sets, "--synset", path, path, *argv)


def test_full_disk_keeps_the_previous_file(save, tmp_path, capsys, monkeypatch):
    path = save(released())

    def fail(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("utils.files.torch.save", fail)
    before = (tmp_path / "distilled_2000.pt").read_bytes()
    assert "free some space" in error_line(capsys, score_sets, "--synset", path, "--export_pt", path)
    assert (tmp_path / "distilled_2000.pt").read_bytes() == before and os.listdir(tmp_path) == ["distilled_2000.pt"]
