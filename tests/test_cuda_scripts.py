"""On a CUDA card: the scripts, and pictures and networks against the CPU's. Skipped where there is none."""

import json

import pytest
import torch
from torch import nn

import distill
from data.augment import Augment
from data.pairs import RetrievalSet
from networks.clip_model import ModelFactory
from networks.image_encoder import build_image_encoder
from tests.card import CARD, NEEDS_CARD, fill_the_card, full_precision  # noqa: F401, a fixture for every test
from tests.unroll import relative_error
from utils.experts.trajectory import Trajectory, expert_path
from utils.scoring import evaluate_retrieval
from utils.scoring.retrieval import retrieval_features
from utils.scoring.training import train_on_pairs
from utils.sets import load_synset

pytestmark = NEEDS_CARD

# ---- the scripts


@pytest.fixture(scope="module")
def run_on_card(run_distill):
    return lambda folder, *more: run_distill(folder, "--device", "cuda", *more)


def changes(folder):
    """What a run made of its pixels and texts."""
    first, last = (load_synset(folder / f"{name}.safetensors") for name in ("iteration_000000", "last"))
    return last.image_syn - first.image_syn, last.text_syn - first.text_syn


def test_resumed_run_is_the_straight_one(run_on_card, tmp_path, monkeypatch):
    """Within a hundredth of the change: a card may sum in another order each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert run_on_card(tmp_path / "straight", "--Iteration", 4) == 0
    assert run_on_card(tmp_path / "resumed", "--Iteration", 2) == 0
    assert run_on_card(tmp_path / "resumed", "--Iteration", 4, "--resume") == 0
    for value, expected in zip(changes(tmp_path / "resumed"), changes(tmp_path / "straight"), strict=True):
        assert relative_error(value, expected) < 0.01


def test_full_memory_names_the_flag_and_the_run_can_go_on(run_on_card, tmp_path, capsys, monkeypatch):
    """Batches of 4 pairs; the card is really full in the second iteration."""
    real, calls = distill.mean_matching, []

    def second_is_full(*args, **student):
        calls.append(args)
        return (real if len(calls) == 1 else fill_the_card)(*args, **student)

    monkeypatch.setattr(distill, "mean_matching", second_is_full)
    assert run_on_card(tmp_path, "--Iteration", 3, "--pair_chunk", 4) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: CUDA is out of memory; give --pair_chunk 2"
    monkeypatch.undo()
    assert run_on_card(tmp_path, "--Iteration", 3, "--resume", "--pair_chunk", 2) == 0


def test_precisions_of_a_run_are_close(run_on_card, metrics, tmp_path):
    losses = {}
    for precision in ("fp32", "tf32", "bf16"):
        assert run_on_card(tmp_path / precision, "--Iteration", 1, "--precision", precision) == 0
        losses[precision] = next(ln["Grand_Loss"] for ln in metrics(tmp_path / precision) if "Grand_Loss" in ln)
    assert losses["tf32"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.2) and losses["bf16"] != losses["fp32"]


def test_experts_are_augmented_on_the_card(run_buffer, tmp_path, monkeypatch):
    seen, call = [], Augment.__call__
    monkeypatch.setattr(Augment, "__call__", lambda self, images: (seen.append(images.device), call(self, images))[1])
    more = "--cache_images", "--num_experts", 1, "--cache_dir", tmp_path / "c", "--device", "cuda"
    assert run_buffer(tmp_path / "b", *more) == 0
    assert len(seen) == 4 and {device.type for device in seen} == {"cuda"}
    expert = Trajectory(expert_path(tmp_path / "b/tiny/test_nfnet/demo", 0))
    first, last = expert.snapshot(0), expert.snapshot(2)
    assert all(torch.isfinite(last[name]).all() and not torch.equal(first[name], last[name]) for name in last)
    lines = (tmp_path / "b/tiny/test_nfnet/demo/metrics.jsonl").read_text().splitlines()
    assert all("train_loss" not in line or json.loads(line)["train_loss"] < 10 for line in lines)


# ---- pictures and networks, against the CPU's


def noise(count=16, side=64):
    """Pictures whose colours are spread evenly, so that no operation makes much of a difference of one level."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return (nn.functional.interpolate(coarse, side, mode="bilinear") * 255).to(torch.uint8)


def test_augmentation_is_that_of_the_cpu():
    """Draws are the CPU's on both; pixels may round to another level, and little more."""
    images, augmented = noise(), []
    augment = Augment(56)
    for device in ("cpu", CARD):
        torch.manual_seed(0)
        augmented.append(augment(images.to(device)).cpu().int())
    difference = (augmented[0] - augmented[1]).abs()
    assert (augmented[0] - images[..., :56, :56].int()).abs().float().mean() > 5
    assert difference.float().mean() < 1 and (difference > 4).float().mean() < 0.02


def test_operations_are_those_of_the_cpu():
    images = noise()
    for number, operation in enumerate(Augment(64).operations):
        difference = (operation(images.to(CARD)).cpu().int() - operation(images).int()).abs()
        assert (difference > 1).float().mean() < 0.001, number


def without_dropout(factory, seed):
    model = factory.fresh(seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_training_on_pairs_and_its_evaluation_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    images, text_embed = torch.randn(6, 3, 32, 32, generator=generator), torch.randn(6, 12, generator=generator)
    pictures, captions = noise(10, 32), torch.randn(20, 12, generator=generator)
    test = RetrievalSet(pictures, ["a caption"] * 20, torch.arange(20) // 2)
    found = []
    for device in ("cpu", CARD):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            factory = ModelFactory(
                lambda: build_image_encoder("test_nfnet", 32, pretrained=False), False, 12, True, device
            )
            model = without_dropout(factory, 3)
        images_there = images.to(device, memory_format=torch.channels_last)
        loss = train_on_pairs(model, images_there, text_embed.to(device), 0.01, 0.01, 3, 4, seed=5)
        features = retrieval_features(model, pictures, captions, 4, device)
        recall = evaluate_retrieval(model, test, captions, 4, device)
        found.append((loss, features[0].cpu(), features[1].cpu(), recall))
    (loss, *features, recall), (expected_loss, *expected, expected_recall) = found[1], found[0]
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    for value, wanted in zip(features, expected, strict=True):
        assert relative_error(value, wanted) < 1e-2
    assert recall["r_mean"] == pytest.approx(expected_recall["r_mean"], abs=5)  # one of ten pictures is ten per cent
