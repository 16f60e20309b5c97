"""Recalls, training, the evaluation's rules and the optimizer of the pairs, against plain computations."""

import errno
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.errors import InputError
from data.pairs import RetrievalSet
from data.transforms import denormalize, normalize
from networks.clip_model import ModelFactory
from networks.loss import PairLoss
from utils import files
from utils.matching.learner import PairLearner
from utils.scoring import training
from utils.scoring.evaluation import Evaluation, evaluate_synset, look_epochs
from utils.scoring.retrieval import RECALLS, evaluate_retrieval, nearest_captions, recalls
from utils.scoring.tables import mean_and_std, recall_table
from utils.scoring.training import make_optimizer, train_epoch, train_on_pairs
from utils.sets import Pairs, SynSet, fit_images

TEXT_DIM, WIDTH, SIZE = 5, 4, 3


class LinearEncoder(nn.Module):
    """An image encoder of one layer, without random numbers in training."""

    mean, std, width = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), WIDTH

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * SIZE * SIZE, WIDTH)

    def forward(self, images):
        return self.layer(images.flatten(1))


@pytest.fixture
def factory():
    return ModelFactory(LinearEncoder, starts_pretrained=True, text_dim=TEXT_DIM)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, SIZE, SIZE, generator=generator), torch.randn(6, TEXT_DIM, generator=generator)


# ---- retrieval


@pytest.mark.parametrize("seed", range(3))
def test_recalls_by_brute_force(seed):
    """Images with five or six captions."""
    generator = torch.Generator().manual_seed(seed)
    counts = [5, 6, 5, 6, 6, 5, 5, 6, 5, 5, 5, 6]
    owner = [image for image, count in enumerate(counts) for _ in range(count)]
    centres = torch.randn(len(counts), 8, generator=generator)
    images = F.normalize(centres + torch.randn(centres.shape, generator=generator), dim=1)
    texts = F.normalize(centres[owner] + 1.2 * torch.randn(len(owner), 8, generator=generator), dim=1)
    expected = {}
    for k in (1, 5, 10):
        hits = 0
        for image in range(len(counts)):
            ranked = sorted(range(len(owner)), key=lambda c: -(images[image] @ texts[c]).item())
            hits += any(owner[caption] == image for caption in ranked[:k])
        expected[f"txt_r{k}"] = 100 * hits / len(counts)
        hits = 0
        for caption in range(len(owner)):
            ranked = sorted(range(len(counts)), key=lambda i: -(images[i] @ texts[caption]).item())
            hits += owner[caption] in ranked[:k]
        expected[f"img_r{k}"] = 100 * hits / len(owner)
    result = recalls(images, texts, torch.tensor(owner))
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    assert result["r_mean"] == pytest.approx(statistics.fmean(expected.values()))
    assert 0 < expected["txt_r1"] < 100 and 0 < expected["img_r1"] < expected["img_r5"] < 100


def test_recalls_of_fewer_than_ten():
    result = recalls(torch.eye(3), torch.eye(3)[[1, 0, 2]], torch.tensor([0, 1, 2]))
    assert result["txt_r1"] == pytest.approx(100 / 3) and result["txt_r10"] == 100 == result["img_r5"]


@pytest.mark.parametrize("training_mode", [True, False])
def test_recall_is_measured_in_evaluation_mode(factory, training_mode):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (7, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    text_embed, owner = torch.randn(14, TEXT_DIM, generator=generator), torch.arange(14) // 2
    model = factory.fresh(0).train(training_mode)
    result = evaluate_retrieval(model, RetrievalSet(images, [""] * 14, owner), text_embed, 2, "cpu")
    assert model.training == training_mode
    with torch.no_grad():
        model.eval()
        features = model.encode_image((images / 255 - 0.5) / 0.25), model.encode_text(text_embed)
    assert result == pytest.approx(recalls(*features, owner))


@pytest.mark.parametrize("block", [4096, 2])
def test_nearest_captions_by_brute_force(monkeypatch, block):
    monkeypatch.setattr("utils.scoring.retrieval.BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    text_syn, text_embed = torch.randn(4, 6, generator=generator), torch.randn(9, 6, generator=generator)
    text_embed[2] *= 100  # by cosine, length has no say
    expected = []
    for row in text_syn:
        cosine = [(row @ other / row.norm() / other.norm()).item() for other in text_embed]
        expected.append(str(cosine.index(max(cosine))))
    assert nearest_captions(text_syn.requires_grad_(), text_embed, [str(i) for i in range(9)]) == expected
    assert nearest_captions(3 * text_embed, text_embed, list("abcdefghi")) == list("abcdefghi")


# ---- training


def test_train_epoch_takes_sgd_steps_with_each_towers_rate(factory, batch):
    images, text_embed = batch
    model = factory.fresh(1)
    model.text_projection.dropout.p = 0.0
    batches = [(images[:4], text_embed[:4]), (images[4:], text_embed[4:])]
    rates = {"image_encoder": 0.3, "text_projection": 0.7}
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, correct = [], 0
    for pictures, texts in batches:  # plain SGD
        leaves = {name: value.requires_grad_() for name, value in params.items()}
        features = torch.func.functional_call(model, leaves, (pictures, texts))
        loss = PairLoss()(*features)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        params = {
            name: (value - rates[name.split(".")[0]] * grad).detach()
            for (name, value), grad in zip(leaves.items(), grads, strict=True)
        }
        losses.append(loss.item() * len(pictures))
        correct += sum(row.argmax().item() == i for i, row in enumerate(features[0] @ features[1].T))
    optimizer = make_optimizer(model, 0.3, 0.7, momentum=0.0, weight_decay=0.0)
    mean_loss, accuracy = train_epoch(model, batches, optimizer)
    for name, p in model.named_parameters():
        assert torch.allclose(p, params[name], rtol=1e-4, atol=1e-6), name
    assert mean_loss == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert accuracy == pytest.approx(100 * correct / 6)


def test_optimizer_leaves_out_what_does_not_train(factory):
    model = factory.fresh(0)
    model.image_encoder.requires_grad_(False)
    (group,) = make_optimizer(model, 0.3, 0.7, momentum=0.5, weight_decay=0.1).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.7, 0.5, 0.1)


def test_training_that_goes_astray_is_an_input_error(factory, batch):
    model = factory.fresh(0)
    images, text_embed = batch
    with pytest.raises(InputError, match="lower the learning rates"):
        train_epoch(model, [(images * float("nan"), text_embed)], make_optimizer(model, 1, 1, 0, 0))


def record_rates(monkeypatch):
    """Makes each epoch note its rates instead of training."""
    seen = []

    def note(model, batches, optimizer, *rest):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()  # without gradients; the schedule asks for it
        return 0.0, 0.0

    monkeypatch.setattr(training, "train_epoch", note)
    return seen


@pytest.mark.parametrize(("epochs", "high"), [(4, 2), (5, 3), (1, 1)])
def test_evaluations_rates_fall_after_half_the_epochs(factory, batch, monkeypatch, epochs, high):
    seen = record_rates(monkeypatch)
    train_on_pairs(factory.fresh(0), *batch, 0.2, 0.4, epochs, 4, seed=0)
    assert torch.allclose(torch.tensor(seen), torch.tensor([[0.2, 0.4]] * high + [[0.02, 0.04]] * (epochs - high)))


def test_decay_changes_what_is_trained(factory, batch, monkeypatch):
    step_lr = torch.optim.lr_scheduler.StepLR
    losses = [train_on_pairs(factory.fresh(0), *batch, 0.1, 0.1, 4, 4, seed=0)]
    monkeypatch.setattr(torch.optim.lr_scheduler, "StepLR", lambda o, step_size, gamma: step_lr(o, 1000))
    losses.append(train_on_pairs(factory.fresh(0), *batch, 0.1, 0.1, 4, 4, seed=0))
    assert losses[0] != losses[1]


def test_training_on_pairs_depends_on_the_seed_alone(factory, batch):
    def train(seed):
        return train_on_pairs(factory.fresh(0), *batch, 0.1, 0.1, 3, 4, seed)

    state = torch.get_rng_state()
    first = train(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert train(1) == first != train(2)


def test_a_fresh_network_learns_the_pairs(factory, batch):
    losses = [train_on_pairs(factory.fresh(0), *batch, 0.05, 0.05, epochs, 6, 0) for epochs in (1, 30)]
    assert losses[1] < losses[0] / 2


# ---- evaluation of a set


def make_synset(batch, **changes):
    values = {"mean": LinearEncoder.mean, "std": LinearEncoder.std, "settings": {}, **changes}
    return SynSet(*batch, 0.1, 0.2, [""] * 6, **values)


def test_pictures_are_normalised_and_resized_for_another_encoder():
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    old, new = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    synset = SynSet(normalize(pixels, *old), torch.zeros(2, 1), 0.1, 0.1, ["", ""], *old)
    assert torch.equal(fit_images(synset, 8, *old), synset.image_syn)
    assert torch.allclose(fit_images(synset, 8, *new), normalize(pixels, *new), atol=1e-5)
    flat = normalize(torch.full((2, 3, 8, 8), 200, dtype=torch.uint8), *old)
    larger = fit_images(SynSet(flat, torch.zeros(2, 1), 0.1, 0.1, ["", ""], *old), 12, *new)
    assert larger.shape == (2, 3, 12, 12)
    assert torch.allclose(denormalize(larger, *new), torch.tensor(200 / 255), atol=1e-5)


def evaluation(num_eval, epochs, looks=0):
    return Evaluation(
        num_eval=num_eval,
        epochs=epochs,
        batch_size=4,
        batch_size_test=5,
        image_size=SIZE,
        temperature=0.07,
        looks=looks,
    )


def test_evaluation_trains_fresh_models_with_the_sets_rates(factory, batch, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (7, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    retrieval = RetrievalSet(images, [""] * 14, torch.arange(14) // 2), torch.randn(14, TEXT_DIM, generator=generator)
    results = evaluate_synset(factory, make_synset(batch), retrieval, evaluation(2, 3), seed=30)
    for k, result in enumerate(results):
        model = factory.fresh(30 + k)
        loss = train_on_pairs(model, *batch, 0.1, 0.2, 3, 4, 30 + k)
        assert result == {**evaluate_retrieval(model, *retrieval, 5, "cpu"), "train_loss": loss}
    assert results[0]["train_loss"] != results[1]["train_loss"]
    seen = record_rates(monkeypatch)
    evaluate_synset(factory, make_synset(batch), retrieval, evaluation(1, 1), seed=30)
    assert seen == [[0.1, 0.2]]


def test_best_look_is_that_of_the_best_network_so_far(factory, batch, monkeypatch):
    """Without a fall of the rates, a network of fewer epochs is the same one, stopped before."""
    step_lr = torch.optim.lr_scheduler.StepLR
    monkeypatch.setattr(torch.optim.lr_scheduler, "StepLR", lambda o, step_size, gamma: step_lr(o, 1000))
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (20, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    retrieval = RetrievalSet(images, [""] * 20, torch.arange(20)), torch.randn(20, TEXT_DIM, generator=generator)
    state = torch.get_rng_state()
    without = evaluate_synset(factory, make_synset(batch), retrieval, evaluation(3, 6), seed=30)
    trained = []
    looking = evaluation(3, 6, looks=3)
    looked = evaluate_synset(factory, make_synset(batch), retrieval, looking, 30, lambda m: trained.append(m.training))
    assert torch.equal(torch.get_rng_state(), state) and trained == [True] * 3
    assert look_epochs(6, 3) == [2, 4, 6] and look_epochs(7, 3) == [2, 4, 7] and look_epochs(3, 3) == [1, 2, 3]
    bests = []
    for k, (result, plain) in enumerate(zip(looked, without, strict=True)):
        best = {key.removeprefix("best_look_"): v for key, v in result.items() if key.startswith("best_look_")}
        assert {key: value for key, value in result.items() if not key.startswith("best_look_")} == plain
        recalls = []
        for epoch in (2, 4, 6):
            model = factory.fresh(30 + k)
            train_on_pairs(model, *batch, 0.1, 0.2, epoch, 4, 30 + k)
            recalls.append(evaluate_retrieval(model, *retrieval, 5, "cpu"))
        assert best == max(recalls, key=lambda recall: recall["r_mean"])
        bests.append(best["r_mean"] > plain["r_mean"])
    assert any(bests)  # the last look is not always the best


def test_looks_go_over_all_phases(factory, batch):
    """Two looks at two phases: after the first the network has trained on the first half of the pairs alone."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (20, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    retrieval = RetrievalSet(images, [""] * 20, torch.arange(20)), torch.randn(20, TEXT_DIM, generator=generator)
    synset = make_synset(batch, phases=2)
    for seed in range(30, 36):
        (result,) = evaluate_synset(factory, synset, retrieval, evaluation(1, 3, looks=2), seed)
        model = factory.fresh(seed)
        train_on_pairs(model, *(part[:3] for part in batch), 0.1, 0.2, 3, 4, seed)
        recalls = [evaluate_retrieval(model, *retrieval, 5, "cpu")["r_mean"], result["r_mean"]]
        assert result["best_look_r_mean"] == max(recalls)


def test_recall_table():
    rows = {"a": [dict.fromkeys(RECALLS, 1.0), dict.fromkeys(RECALLS, 2.0)], "b": [dict.fromkeys(RECALLS, 3.25)]}
    mean, std = mean_and_std(rows["a"])
    assert (mean["r_mean"], std["r_mean"]) == (1.5, 0.5)
    lines = recall_table(rows).splitlines()
    assert lines[0] == "| set | TR@1 | TR@5 | TR@10 | IR@1 | IR@5 | IR@10 | mean |"
    assert lines[2:] == ["| a |" + " 1.5 ± 0.5 |" * 7, "| b |" + " 3.2 ± 0.0 |" * 7]


# ---- the optimizer of the pairs


def make_pairs(value=1.0):
    return Pairs(*(torch.full(shape, value) for shape in ((2, 3, 1, 1), (2, 5), (), ())))


def test_learner_is_sgd_with_momentum_a_half():
    learner = PairLearner(make_pairs(), 0.1, 0.2, 0.01)
    for gradient in (1.0, 2.0, -1.0):
        learner.step(make_pairs(gradient))
    moved = 1.0 + 2.5 + 0.25  # velocities v <- v / 2 + gradient
    expected = [1 - rate * moved for rate in (0.1, 0.2, 0.01, 0.01)]
    assert [tensor.view(-1)[0].item() for tensor in learner.pairs.tensors()] == pytest.approx(expected)
    assert learner.iteration == 3


def test_learned_rates_stay_positive_and_pixels_need_not():
    learner = PairLearner(make_pairs(), 10.0, 10.0, 10.0)
    learner.step(make_pairs())
    image_syn, text_syn, lr_img, lr_txt = learner.pairs.tensors()
    assert (image_syn == -9).all() and (text_syn == -9).all()
    for _ in range(20):  # each step can halve a rate
        learner.step(make_pairs())
    assert lr_img.item() == lr_txt.item() == pytest.approx(2.0**-21, rel=0.1)


@pytest.mark.parametrize("lr_lr", [0.0, 0.1])
def test_a_small_rate_is_not_raised_without_a_word(lr_lr):
    """Nothing moves it without a gradient or without a rate of its own; a step at most doubles it."""
    pairs = make_pairs()
    pairs.syn_lr_img.fill_(2e-5)
    pairs.syn_lr_txt.fill_(3e-5)
    learner = PairLearner(pairs, 0.1, 0.1, lr_lr)
    gradient = make_pairs(0.0 if lr_lr else -1.0)
    learner.step(gradient)
    assert pairs.syn_lr_img.item() == pytest.approx(2e-5) and pairs.syn_lr_txt.item() == pytest.approx(3e-5)
    learner.step(make_pairs(-1.0))
    assert pairs.syn_lr_img.item() == pytest.approx(4e-5 if lr_lr else 2e-5)


def test_learner_tells_what_is_not_finite():
    learner = PairLearner(make_pairs(), 0.1, 0.1, 0.1)
    assert learner.is_finite()
    learner.step(make_pairs(float("inf")))
    assert not learner.is_finite()


def test_learner_resumes_exactly(tmp_path):
    path, settings = tmp_path / "state.safetensors", {"seed": 1, "Iteration": 2}
    straight = PairLearner(make_pairs(), 0.1, 0.2, 0.01)
    straight.step(make_pairs(3.0))
    straight.best, straight.evaluated = 12.5, 1
    straight.save(path, settings)
    resumed = PairLearner(make_pairs(7.0), 0.1, 0.2, 0.01)
    resumed.load(path, {"seed": 1, "Iteration": 9}, free={"Iteration"})
    assert (resumed.iteration, resumed.evaluated, resumed.best) == (1, 1, 12.5)
    for learner in (straight, resumed):
        learner.step(make_pairs(-2.0))
    for left, right in zip(straight.pairs.tensors(), resumed.pairs.tensors(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(InputError, match="seed=1, not 2"):
        resumed.load(path, {"seed": 2, "Iteration": 2}, free={"Iteration"})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="damaged"):
        resumed.load(path, settings, free=set())


def test_learner_before_the_first_step_and_evaluation(tmp_path):
    PairLearner(make_pairs(), 0.1, 0.2, 0.01).save(tmp_path / "state", {})
    resumed = PairLearner(make_pairs(7.0), 0.1, 0.2, 0.01)
    resumed.load(tmp_path / "state", {}, free=set())
    assert (resumed.iteration, resumed.evaluated, resumed.best) == (0, -1, float("-inf"))
    assert (resumed.pairs.image_syn == 1).all()


def test_full_disk_keeps_the_previous_state(tmp_path, monkeypatch):
    learner = PairLearner(make_pairs(), 0.1, 0.2, 0.01)
    learner.save(tmp_path / "state", {})

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", fail)
    learner.step(make_pairs())
    with pytest.raises(InputError, match="No space left"):
        learner.save(tmp_path / "state", {})
    resumed = PairLearner(make_pairs(7.0), 0.1, 0.2, 0.01)
    resumed.load(tmp_path / "state", {}, free=set())
    assert resumed.iteration == 0
