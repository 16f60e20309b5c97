"""Frozen encoders with a projection head on each side: experts, distillation and evaluation on features."""

import threading

import pytest
import torch
from torchvision.models import squeezenet1_1

import buffer
import distill
import evaluate
from data.pairs import load_images, retrieval_set
from data.transforms import normalize
from networks.clip_model import ModelFactory, trained_parameters
from networks.image_encoder import build_image_encoder
from networks.loss import PairLoss
from tests.programs import error_line, table
from tests.test_scripts import TENSORS, same_set
from utils.experts import Trajectory
from utils.scoring import (
    EmbedLoader,
    Evaluation,
    embed_images,
    embed_views,
    embedded_once,
    evaluate_retrieval,
    evaluate_synset,
    features,
)
from utils.scoring.training import train_on_pairs
from utils.sets import fit_images, load_synset

HEADS = ["--recipe", "heads"]
ADAM = ["--optimizer", "adam", "--student_momentum", "0.9", "--lr_teacher_img", "0.03", "--lr_teacher_txt", "0.03"]


@pytest.fixture(scope="module")
def heads_buffer(run_buffer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    assert run_buffer(folder, *HEADS, "--num_experts", 1) == 0
    return folder


@pytest.fixture(scope="module")
def run_heads(tiny_argv, heads_buffer):
    """distill.py with Adam outside."""

    def run(save_dir, *more):
        quick = ["--num_queries", 6, "--eval_it", 2, "--num_eval", 2, "--epoch_eval_train", 2, "--disabled_wandb"]
        paths = ["--no_report", "--buffer_path", heads_buffer, "--save_dir", save_dir]
        argv = [*tiny_argv, *HEADS, *ADAM, *quick, *paths, *more]
        return distill.main([str(value) for value in argv])

    return run


@pytest.fixture(scope="module")
def heads_run(run_heads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads_runs") / "straight"
    assert run_heads(folder, "--Iteration", 3) == 0
    return folder


@pytest.fixture(scope="module")
def encoder():
    return build_image_encoder("test_nfnet", 32, pretrained=False).requires_grad_(False)


@pytest.fixture
def paths(tiny_data):
    return sorted(tiny_data.glob("demo-images/train_*.png"))


# ---- experts on features


def test_experts_are_the_two_heads(heads_buffer):
    (path,) = heads_buffer.glob("tiny/test_nfnet_heads/demo/expert_*.safetensors")
    expert = Trajectory(path)
    assert {name.split(".")[0] for name in expert.names()} == {"image_projection", "text_projection"}
    first, last = expert.snapshot(0), expert.snapshot(2)
    assert all(not torch.equal(first[name], last[name]) for name in first)
    assert expert.settings["recipe"] == "heads" and not expert.settings["image_trainable"]


def test_batches_are_rows_once_an_epoch_with_the_features_of_their_pictures(encoder, paths, tmp_path):
    embed = embed_views(paths, encoder, 32, 0, 5, 0, "cpu", tmp_path)
    row_to_image = torch.arange(len(paths)).repeat_interleave(2)
    with torch.no_grad():
        expected = encoder(normalize(load_images(paths, 32), encoder.mean, encoder.std))[row_to_image]
    loader = EmbedLoader(embed, row_to_image, 7, seed=3)
    epochs = []
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) and {len(rows) for _, rows in batches} == {7, len(row_to_image) % 7}
        for embed, rows in batches:
            assert torch.allclose(embed, expected[rows], atol=1e-5)
        epochs.append(torch.cat([rows for _, rows in batches]))
        assert sorted(epochs[-1].tolist()) == list(range(len(row_to_image)))
    assert not torch.equal(*epochs)
    again = torch.cat([rows for _, rows in EmbedLoader(embed, row_to_image, 7, seed=3)])
    assert torch.equal(again, epochs[0])


def test_views_are_augmented_cached_and_the_same_for_any_number_of_workers(encoder, paths, tmp_path, capsys):
    paths = paths[:4]
    views = embed_views(paths, encoder, 32, 3, 5, 0, "cpu", tmp_path / "a")
    assert "features of 3 views of 4 pictures" in capsys.readouterr().out
    assert views.shape == (3, 4, encoder.width)
    assert torch.equal(views, embed_views(paths, encoder, 32, 3, 5, 2, "cpu", tmp_path / "b"))
    (file,) = (tmp_path / "a").glob("image_*.safetensors")
    written = file.stat().st_mtime_ns
    assert torch.equal(views, embed_views(paths, encoder, 32, 3, 5, 0, "cpu", tmp_path / "a"))
    assert file.stat().st_mtime_ns == written
    plain = embed_images(paths, encoder, 32, 5, "cpu", tmp_path / "a")
    distances = torch.stack([(view - plain).norm(dim=1) for view in views])  # [V, P]
    assert (distances.amax(dim=0) > 0).all()
    assert (views[0] != views[1]).any() and (distances < plain.norm(dim=1)).all()


def test_the_next_item_is_read_while_one_is_worked_on():
    reading, worked_on = threading.Event(), []

    def read(item):
        if item == 1:
            reading.set()
        return 10 * item

    for value in features.read_ahead(read, range(4)):
        assert reading.wait(10)  # item 1 is read though 0 is still worked on
        worked_on.append(value)
    assert worked_on == [0, 10, 20, 30]
    assert list(features.read_ahead(read, [])) == []


def test_a_view_of_each_row_is_drawn_anew():
    embed = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 1)  # the feature is the view's number
    loader = EmbedLoader(embed, torch.arange(100) % 2, 10, seed=0)
    drawn = [torch.cat([features.flatten() for features, _ in loader]) for _ in range(2)]
    assert set(drawn[0].tolist()) == {0, 1, 2, 3} and not torch.equal(*drawn)


# ---- distillation


def test_pictures_texts_and_rates_are_learned(heads_run, metrics):
    first, last = (load_synset(heads_run / f"{name}.safetensors") for name in ("iteration_000000", "last"))
    assert first.image_syn.shape == (6, 3, 32, 32)
    for name in TENSORS:
        assert not torch.equal(torch.as_tensor(getattr(first, name)), torch.as_tensor(getattr(last, name))), name
    assert (first.syn_lr_img, first.syn_lr_txt) == pytest.approx((0.03, 0.03))
    assert last.settings["recipe"] == "heads" and last.settings["student_momentum"] == 0.9
    # Adam's first steps are as long as its rate: 0.03 standard deviations, for each pixel that has a gradient.
    moved = (last.image_syn - first.image_syn).abs()
    assert 0 < moved.max() <= 3.1 * 0.03 * first.image_syn.std()
    losses = [line["Grand_Loss"] for line in metrics(heads_run) if "Grand_Loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_resumed_run_equals_the_straight_one(heads_run, run_heads, tmp_path):
    assert run_heads(tmp_path / "run", "--Iteration", 1) == 0
    assert run_heads(tmp_path / "run", "--Iteration", 3, "--resume") == 0
    assert same_set(tmp_path / "run/last.safetensors", heads_run / "last.safetensors")


def test_chunks_of_pictures_change_nothing(heads_run, run_heads, tmp_path):
    assert run_heads(tmp_path / "r", "--Iteration", 3, "--pair_chunk", 4) == 0
    chunked, whole = (load_synset(folder / "last.safetensors") for folder in (tmp_path / "r", heads_run))
    assert torch.allclose(chunked.image_syn, whole.image_syn, atol=1e-3)


def test_experts_over_other_frozen_weights_are_refused(run_heads, tmp_path, capsys):
    line = error_line(capsys, run_heads, tmp_path / "r", "--image_checkpoint", save_other_weights(tmp_path))
    assert "other frozen weights" in line and "--image_checkpoint" in line
    assert not (tmp_path / "r").exists()


def test_experts_of_another_kind_are_named(run_heads, run_distill, heads_buffer, experts, tmp_path, capsys):
    line = error_line(capsys, run_distill, tmp_path / "r", "--buffer_path", heads_buffer)
    assert "was trained with image_trainable=False, this run has image_trainable=True" in line
    line = error_line(capsys, run_heads, tmp_path / "r", "--buffer_path", experts)
    assert "was trained with image_trainable=True, this run has image_trainable=False" in line


def save_other_weights(folder):
    torch.manual_seed(5)
    torch.save(build_image_encoder("test_nfnet", 32, pretrained=False).model.state_dict(), folder / "other.pth")
    return folder / "other.pth"


def test_an_image_projection_over_an_encoder_that_trains(run_buffer, run_distill, tmp_path):
    argv = ["--only_has_image_projection", "--num_experts", 1]
    assert run_buffer(tmp_path / "b", *argv) == 0
    (path,) = tmp_path.glob("b/tiny/test_nfnet_projected/demo/expert_*.safetensors")
    towers = {name.split(".")[0] for name in Trajectory(path).names()}
    assert towers == {"image_encoder", "image_projection", "text_projection"}
    flags = "--only_has_image_projection", "--student_momentum", 0.9, "--optimizer", "adam"
    assert run_distill(tmp_path / "r", *flags, "--buffer_path", tmp_path / "b", "--Iteration", 1) == 0
    assert evaluate.main(["--synset", str(tmp_path / "r/last.safetensors"), "--num_eval", "1"]) == 0


def test_heads_over_a_model_of_torchvision(run_buffer, run_distill, tmp_path):
    weights = tmp_path / "squeezenet.pth"
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), weights)
    flags = [*HEADS, "--image_encoder", "torchvision:squeezenet1_1", "--image_checkpoint", weights]
    assert run_buffer(tmp_path / "b", *flags, "--num_experts", 1) == 0
    (path,) = tmp_path.glob("b/tiny/torchvision--squeezenet1_1_heads/demo/expert_*.safetensors")
    assert Trajectory(path).shapes()["image_projection.projection.weight"] == (512, 512)
    assert run_distill(tmp_path / "r", *flags, "--buffer_path", tmp_path / "b", "--Iteration", 1) == 0
    first, last = (load_synset(tmp_path / f"r/{name}.safetensors") for name in ("iteration_000000", "last"))
    assert last.settings["image_encoder"] == "torchvision:squeezenet1_1"
    assert not torch.equal(first.image_syn, last.image_syn)
    assert evaluate.main(["--synset", str(tmp_path / "r/last.safetensors"), "--num_eval", "1"]) == 0


def test_pictures_cache_has_no_use_for_a_frozen_encoder(run_buffer, tmp_path, capsys):
    assert "--cache_images" in error_line(capsys, run_buffer, tmp_path, *HEADS, "--cache_images")


def test_views_have_no_use_for_an_encoder_that_trains(run_buffer, tmp_path, capsys):
    assert "--image_trainable False" in error_line(capsys, run_buffer, tmp_path, "--aug_views", 2)


# ---- evaluation on features


def test_evaluation_on_features_equals_evaluation_through_the_encoder(heads_run, encoder, tiny_data, tmp_path):
    synset = load_synset(heads_run / "last.safetensors")
    factory = ModelFactory(lambda: encoder, True, 128, image_trainable=False, image_projection=True)
    records_paths = sorted(tiny_data.glob("demo-images/val_*.png"))

    class Record:
        captions = ("a", "b")

    pictures = retrieval_set([Record] * len(records_paths), records_paths, 32)
    generator = torch.Generator().manual_seed(0)
    retrieval = pictures, torch.randn(len(pictures.captions), 128, generator=generator)
    once = embedded_once(retrieval, factory, 3, tmp_path)
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "load_images", lambda *a: read.append(a))  # the second time it lies in the cache
        assert torch.equal(embedded_once(retrieval, factory, 3, tmp_path)[0].image_embed, once[0].image_embed)
    assert not read
    assert once[0].image_embed.shape == (len(records_paths), encoder.width)
    evaluation = Evaluation(num_eval=1, epochs=3, batch_size=4, batch_size_test=5, image_size=32, temperature=0.07)
    (result,) = evaluate_synset(factory, synset, once, evaluation, seed=30)
    model = factory.fresh(30, PairLoss(synset.loss_type))
    images = fit_images(synset, 32, encoder.mean, encoder.std)
    rates = synset.syn_lr_img, synset.syn_lr_txt
    loss = train_on_pairs(model, images, synset.text_syn, *rates, 3, 4, 30, synset.targets)
    assert result["train_loss"] == pytest.approx(loss, rel=1e-4)
    assert result["r_mean"] == pytest.approx(evaluate_retrieval(model, *retrieval, 5, "cpu")["r_mean"])


def test_sets_learned_with_heads_train_whole_networks(heads_run, capsys):
    argv = ["--synset", str(heads_run / "last.safetensors"), "--num_eval", "1"]
    assert evaluate.main(argv) == 0
    ((*_, heads),) = [row[:5] for row in table(capsys.readouterr().out)[1]]
    assert heads == "projections alone"
    assert evaluate.main([*argv, "--image_trainable", "True", "--only_has_image_projection", "False"]) == 0
    ((*_, whole),) = [row[:5] for row in table(capsys.readouterr().out)[1]]
    assert whole == "whole image encoder"


def test_frozen_weights_without_a_checkpoint_are_the_same_for_every_seed():
    def build():
        return build_image_encoder("test_nfnet", 32, pretrained=False)

    first, second = (ModelFactory(build, False, 6, image_trainable=False, image_projection=True) for _ in range(2))
    models = [first.fresh(0).state_dict(), second.fresh(1).state_dict()]
    assert first.base == second.base
    for name in models[0]:
        drawn = name.endswith("weight") and name.split(".")[0] in ("image_projection", "text_projection")
        if name.startswith("image_encoder.") or (drawn and "layer_norm" not in name):
            assert torch.equal(models[0][name], models[1][name]) != drawn, name
    assert all(not name.startswith("image_encoder.") for name in trained_parameters(first.fresh(0)))


# ---- recipes


def test_a_recipe_is_a_set_of_defaults():
    heads = distill.parse_args(["--recipe", "heads"])
    assert (heads.optimizer, heads.loss_type, heads.sim_type, heads.segments) == ("sgd", "WBCE", "lowrank", 4)
    assert (heads.lr_img, heads.lr_txt, heads.lr_lr, heads.lr_sim) == (300.0, 300.0, 0.01, 10.0)
    assert heads.mini_batch_size == 20 and not heads.image_trainable
    paper = distill.parse_args([])
    assert (paper.recipe, paper.optimizer, paper.lr_img, paper.lr_lr) == ("wu2024", "sgd", 1000.0, 0.01)
    assert paper.student_temperature == pytest.approx(0.376, abs=1e-3) and paper.student_momentum == 0
    mixed = distill.parse_args(["--recipe", "heads", "--student_momentum", "0.9", "--lr_txt", "7"])
    assert (mixed.lr_img, mixed.lr_txt, mixed.student_momentum) == (300.0, 7.0, 0.9)
    whole = distill.parse_args(["--recipe", "adam"])
    assert (whole.optimizer, whole.lr_img, whole.mini_batch_size, whole.image_trainable) == ("adam", 0.03, 25, True)
    assert (whole.lr_teacher_img, whole.lr_teacher_txt) == ("fit", "fit")
    adam = distill.parse_args(["--recipe", "heads", "--optimizer", "adam", "--lr_txt", "7"])
    assert (adam.lr_img, adam.lr_txt, adam.lr_sim) == (0.03, 7.0, 0.03)  # a recipe's rates are those of its optimizer
    assert distill.parse_args(["--dataset", "demo"]).recipe == "demo"
    on_demo = distill.parse_args(["--dataset", "demo", "--recipe", "heads"])
    assert (on_demo.recipe, on_demo.segments, on_demo.image_encoder) == ("heads", 4, "test_nfnet")
    assert (buffer.parse_args(["--recipe", "heads"]).lr_teacher_img, heads.lr_teacher_img) == (0.1, "fit")
    with pytest.raises(SystemExit):
        distill.parse_args(["--recipe", "nothing"])
