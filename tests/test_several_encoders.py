"""One set of pairs learned through several frozen image encoders, and pictures as mixtures of real ones."""

import json

import pytest
import torch

import buffer
import distill
from data.transforms import normalize
from networks.clip_model import ModelFactory
from networks.image_encoder import build_image_encoder
from tests.conftest import QUICK_BUFFER, QUICK_DISTILL
from tests.programs import error_line, score_sets, table
from tests.unroll import NUM_PAIRS, Problem, check_matching, unroll_gradient
from utils.experts import Trajectory
from utils.forms import Mixture, as_words, mix
from utils.matching import PairLearner
from utils.scoring.evaluation import training_images
from utils.scoring.training import train_on_pairs
from utils.sets import Pairs, SynSet, load_synset, save_synset
from utils.setup import args_of_encoders, pairs_of_encoder, settings_of_encoder
from utils.setup.student import RealPictures
from utils.student import StudentLoss, matching_gradient, mean_over_encoders

TWO = ["--image_encoder", "test_nfnet", "test_resnet", "--image_checkpoint", "none", "none", "--no_image_pretrained"]
HEADS = ["--image_trainable", "False", "--only_has_image_projection"]


# ---- the gradient


def heads(encoder):
    problem = Problem(encoder, dropout=0.0, freeze="image_encoder", image_projection=True)
    problem.model.image_encoder.eval()
    weights = torch.randn(NUM_PAIRS, 7, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    features = torch.randn(
        7, problem.model.image_encoder.width, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    problem.pairs = Pairs(weights, *problem.pairs.tensors()[1:])
    problem.loss_fn = StudentLoss(problem.model, embed=lambda rows: mix(rows, features))
    return problem


@pytest.mark.parametrize("pair_chunk", [None, 2])
def test_gradient_of_mixtures_over_two_encoders_is_the_mean_of_two_unrolls(pair_chunk):
    problems = [heads("test_nfnet"), heads("test_vit")]
    shared = problems[0].pairs
    rates = torch.tensor([0.02, 0.03]).double(), torch.tensor([0.05, 0.01]).double()
    pairs = Pairs(shared.image_syn, shared.text_syn, *rates)
    matchings, expected = {}, []
    for number, problem in enumerate(problems):
        own = pairs_of_encoder(pairs, number)
        loss_fn, start, target, _, batches, seed = problem.arguments(3)
        matchings[number] = matching_gradient(loss_fn, start, target, own, batches, seed, pair_chunk, momentum=0.9)
        expected.append(unroll_gradient(Mixed(loss_fn), start, target, own, batches, seed, momentum=0.9))
    loss = sum(loss for loss, _ in expected) / 2
    first, second = (gradient for _, gradient in expected)
    gradient = Pairs(
        (first.image_syn + second.image_syn) / 2,
        (first.text_syn + second.text_syn) / 2,
        torch.stack([first.syn_lr_img, second.syn_lr_img]) / 2,
        torch.stack([first.syn_lr_txt, second.syn_lr_txt]) / 2,
    )
    check_matching(mean_over_encoders(matchings, 2), loss, gradient)


class Mixed:
    """The student's loss of weights, by `unroll`."""

    def __init__(self, loss_fn):
        self.loss_fn = loss_fn

    def __call__(self, params, weights, text_embed):
        inner = self.loss_fn.on_embeddings()
        return inner(params, self.loss_fn.frozen_encoder(weights), text_embed)


def test_an_encoder_that_took_no_part_keeps_its_rates():
    problem = heads("test_nfnet")
    arguments = problem.arguments(2)
    mean = mean_over_encoders({1: matching_gradient(*arguments)}, 3)
    alone = matching_gradient(*arguments)
    assert mean.gradient.syn_lr_img.tolist() == [0, alone.gradient.syn_lr_img.item(), 0]
    assert torch.equal(mean.gradient.image_syn, alone.gradient.image_syn)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_momentum_moves_no_rate_of_an_encoder_that_took_no_part(optimizer):
    pairs = Pairs(torch.eye(3, 4), torch.randn(3, 5), torch.full((2,), 0.1), torch.full((2,), 0.1))
    learner = PairLearner(pairs, lr_img=0.1, lr_txt=0.1, lr_lr=0.1, optimizer=optimizer)
    for drawn in (0, 1):
        rates = torch.zeros(2)
        rates[drawn] = 0.3
        before = pairs.syn_lr_img.detach().clone()
        learner.step(Pairs(torch.zeros(3, 4), torch.zeros(3, 5), rates, rates.clone()))
        moved = pairs.syn_lr_img.detach() != before
        assert moved.tolist() == [drawn == 0, drawn == 1]


def test_a_mixture_is_a_weighted_sum_of_the_usual_norm():
    features = torch.randn(4, 3, dtype=torch.float64)
    mixed = mix(torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, -1.0, 0.5, 0.0]], dtype=torch.float64), features)
    by_hand = features[0] - features[1] + features[2] / 2
    usual = sum(row.norm() for row in features) / 4
    assert torch.allclose(mixed[0], features[1] / features[1].norm() * usual)
    assert torch.allclose(mixed[1], by_hand / by_hand.norm() * usual)


# ---- the scripts


@pytest.fixture(scope="module")
def two(tiny_argv, tmp_path_factory):
    """Buffer folder with an expert of heads over each of two encoders, by one command."""
    folder = tmp_path_factory.mktemp("two")
    argv = [*tiny_argv, *QUICK_BUFFER, *TWO, *HEADS, "--num_experts", "1", "--buffer_path", str(folder)]
    assert buffer.main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def run(tiny_argv, two):
    def distil(save_dir, *more):
        argv = [*tiny_argv, *QUICK_DISTILL, *TWO, *HEADS, "--buffer_path", str(two), "--save_dir", str(save_dir)]
        return distill.main([*argv, "--Iteration", "2", "--no_report", *map(str, more)])

    return distil


PYRAMID = ["--pix_param", "pyramid"]
MIXTURE = ["--pix_param", "mixture", "--pix_words", "10", "--optimizer", "adam", "--lr_img", "0.01"]


def test_experts_of_each_encoder_by_one_command(two):
    names = sorted(path.parent.parent.name for path in two.glob("**/expert_000.safetensors"))
    assert names == ["test_nfnet_heads", "test_resnet_heads"]
    for path in two.glob("**/expert_000.safetensors"):
        assert f"{Trajectory(path).settings['image_encoder']}_heads" == path.parent.parent.name


@pytest.mark.parametrize(
    "more",
    [
        [],
        MIXTURE,
        ["--text_only"],
        ["--encoders_per_step", "1"],
        ["--pix_param", "pyramid", "--syn_aug", "--eval_views", 1],
    ],
)
def test_a_set_of_two_encoders_is_learned_resumed_and_scored(run, tiny_data, tmp_path, capsys, more):
    assert run(tmp_path / "a", "--report", *more) == 0
    page = json.loads((tmp_path / "a/report.json").read_text())
    encoders = [row["image_encoder"] for row in page["test"] if row["set"].startswith("best")]
    assert encoders == ["test_nfnet", "test_resnet"]
    out = capsys.readouterr().out
    assert "on test_nfnet |" in out and "on test_resnet |" in out
    assert run(tmp_path / "b", "--Iteration", 1, *more) == 0
    assert run(tmp_path / "b", "--resume", *more) == 0
    a, b = (load_synset(tmp_path / name / "last.safetensors") for name in "ab")
    assert torch.equal(a.text_syn, b.text_syn) and torch.equal(a.image_syn, b.image_syn)
    assert a.rates == b.rates and set(a.rates) == {"test_nfnet", "test_resnet"}
    first = load_synset(tmp_path / "a/iteration_000000.safetensors")
    assert not torch.equal(first.text_syn, a.text_syn)
    if "mixture" in more:
        assert torch.equal(first.mixture.weights, torch.eye(len(first.captions), 10))
        assert not torch.equal(a.mixture.weights, first.mixture.weights) and len(a.mixture.words) == 10
    else:
        assert torch.equal(a.image_syn, first.image_syn) == ("--text_only" in more)
    capsys.readouterr()
    numbers = tmp_path / "t.json"
    assert score_sets("--synset", tmp_path / "a/last.safetensors", "--json", numbers) == 0
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["image_encoder"] for row in rows] == ["test_nfnet", "test_resnet"]
    assert [row["rates"] for row in rows] == [pytest.approx(a.rates[row["image_encoder"]]) for row in rows]
    assert {row["pictures"] for row in rows} == {10 if "mixture" in more else len(a.captions)}
    out = capsys.readouterr().out
    assert len(table(out)[1]) == 2 and out.splitlines()[-1].count(" *") == 2  # both took part
    if "mixture" in more:  # its folder holds what its file does
        assert score_sets("--synset", tmp_path / "a/last.safetensors", "--export", tmp_path / "f") == 0
        places = "--image_root", tiny_data, "--ann_root", tiny_data
        assert score_sets("--synset", tmp_path / "f", *places, "--json", numbers) == 0
        assert json.loads(numbers.read_text())["rows"] == [{**row, "set": f"{tmp_path.name}/f"} for row in rows]


def test_views_of_real_pictures_are_drawn_for_each_picture_and_iteration(run, tmp_path, monkeypatch):
    """Rows of what weights are over are those of the encoder for the pictures or for one of their views."""
    drawn = []
    draw = RealPictures.draw

    def watch(real, seed):
        draw(real, seed)
        drawn.append((real.seen.clone(), real.features, seed))

    monkeypatch.setattr(RealPictures, "draw", watch)
    assert run(tmp_path, *MIXTURE, "--syn_views", 2, "--lr_teacher_img", "0.1", "--lr_teacher_txt", "0.1") == 0
    assert len(drawn) == 4  # two iterations, two encoders
    numbers = []
    for seen, features, _ in drawn:
        equal = torch.stack([(seen == of_view).all(dim=1) for of_view in features])
        assert len(features) == 3 and equal.sum(dim=0).tolist() == [1] * 10
        numbers.append(equal.int().argmax(dim=0).tolist())
    assert numbers[0] != numbers[2] and len(set(numbers[0])) > 1


def test_files_of_lower_quality_are_smaller(run, tmp_path):
    for name, quality in (("a", 90), ("b", 30)):
        assert run(tmp_path / name, *MIXTURE, "--pix_quality", quality, "--Iteration", 0) == 0
    fine, coarse = (load_synset(tmp_path / name / "last.safetensors") for name in "ab")
    assert coarse.nbytes < fine.nbytes
    assert not torch.equal(coarse.mixture.pictures(), fine.mixture.pictures())


def test_texts_alone_need_no_pixel_gradient_and_give_the_same_texts(run, tmp_path, monkeypatch):
    """As with pictures that could move and have a rate of 0."""
    assert run(tmp_path / "a", "--text_only") == 0
    assert run(tmp_path / "b", "--lr_img", 0) == 0
    a, b = (load_synset(tmp_path / name / "last.safetensors") for name in "ab")
    assert torch.allclose(a.text_syn, b.text_syn, rtol=1e-4, atol=1e-6)


def test_a_mixture_of_one_picture_is_the_picture(tmp_path):
    """In a file and in training: the JPEG file's pixels, at the mean norm of all."""
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    factory = ModelFactory(lambda: build_image_encoder("test_resnet", 32, False), False, 5, image_trainable=False)
    words = as_words(pictures)
    mean, std = factory.encoder.mean, factory.encoder.std
    synset = synset_of(torch.eye(3, 4)[[0, 2, 1]], words, mean, std)
    save_synset(tmp_path / "s.safetensors", synset)
    synset = load_synset(tmp_path / "s.safetensors")
    images = training_images(factory, synset, 32, 2)
    plain = training_images(factory, synset_of(None, words, mean, std), 32, 2)
    usual = plain.norm(dim=1).mean()
    assert torch.allclose(images, (plain / plain.norm(dim=1, keepdim=True))[[0, 2, 1]] * usual, rtol=1e-4, atol=1e-5)


def test_a_whole_network_trains_on_mixtures_as_on_the_pictures_they_are_made_of():
    """One picture a mixture: training equals that on the pictures themselves, and moves the encoder."""
    generator = torch.Generator().manual_seed(1)
    words = as_words(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator))
    factory = ModelFactory(lambda: build_image_encoder("test_nfnet", 32, False), False, 5)
    mean, std = factory.encoder.mean, factory.encoder.std
    synset = synset_of(torch.eye(4), words, mean, std)
    pictures = normalize(Mixture(torch.eye(4), words).pictures(), mean, std)

    def trained(pictures_of):
        model = factory.fresh(3)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        train_on_pairs(model, pictures_of(model), synset.text_syn, 0.01, 0.01, epochs=3, batch_size=4, seed=5)
        return start, {name: value.clone() for name, value in model.state_dict().items()}

    (start, mixed), (_, plain) = (
        trained(training_images(factory, synset, 32, 2).behind),
        trained(lambda model: pictures),
    )
    assert all(torch.allclose(mixed[name], plain[name], rtol=1e-4, atol=1e-5) for name in plain)
    assert not torch.equal(
        mixed["image_encoder.model.stem.conv1.weight"], start["image_encoder.model.stem.conv1.weight"]
    )


def synset_of(weights, words, mean, std):
    number = 4 if weights is None else len(weights)
    mixture = None if weights is None else Mixture(weights, words)
    pictures = normalize(Mixture(torch.eye(4), words).pictures(), mean, std)[:number]
    return SynSet(pictures, torch.randn(number, 5), 0.1, 0.1, ["a"] * number, mean, std, mixture=mixture)


def test_a_run_does_not_start_from_mixtures(run, tmp_path, capsys):
    assert run(tmp_path / "m", *MIXTURE, "--Iteration", 0) == 0
    line = error_line(capsys, run, tmp_path / "x", "--init_set", tmp_path / "m/last.safetensors")
    assert "holds mixtures" in line and not (tmp_path / "x").exists()


def test_settings_of_one_of_several_encoders():
    settings = {
        "image_encoder": ["a", "torchvision:b"],
        "image_checkpoint": ["none", "b.pt"],
        "image_kwargs": {"x": 1, "a:y": 2, "torchvision:b:z": 3},
    }
    assert settings_of_encoder(settings, "a") == {
        "image_encoder": "a",
        "image_checkpoint": None,
        "image_kwargs": {"x": 1, "y": 2},
    }
    assert settings_of_encoder(settings, "torchvision:b")["image_kwargs"] == {"x": 1, "z": 3}
    (own,) = args_of_encoders(buffer.parse_args(["--image_encoder", "a", "--image_kwargs", "x=1", "a:y=2"]))
    assert own.image_kwargs == {"x": 1, "y": 2}  # one encoder's arguments may have its name too


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image_trainable", "True"], ["--image_trainable False"]),
        (["--image_encoder", "test_nfnet", "test_nfnet"], ["each one once"]),
        (["--image_checkpoint", "none"], ["1 values", "2 image encoders"]),
        (["--image_kwargs", "test_vit:x=1"], ["test_vit:x", "test_nfnet, test_resnet"]),
        (["--image_encoder", "test_nfnet", "test_vit"], ["no expert", "test_vit"]),
        (["--encoders_per_step", 3], ["--encoders_per_step 3", "2 encoders"]),
        (["--pix_param", "mixture", "--pix_words", 2], ["--pix_words 2"]),
        (["--pix_param", "mixture", "--pix_words", 25], ["--pix_words 25", "24 pictures"]),
        (["--pix_param", "mixture", "--pix_init", "noise"], ["--pix_init noise"]),
        (["--pix_quality", 99], ["--pix_quality", "99"]),
        (["--syn_views", 2], ["--syn_views", "--pix_param mixture"]),
    ],
)
def test_wrong_input(run, tmp_path, capsys, more, words):
    line = error_line(capsys, run, tmp_path / "x", *more)
    assert all(word in line for word in words), line
    assert not (tmp_path / "x").exists()
