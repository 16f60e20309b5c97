"""On a CUDA card: the equalities of the CPU, and what only a card has. Skipped where there is none."""

import contextlib
import gc
import json

import pytest
import torch
from torch import nn

import buffer
import distill
from data.augment import Augment
from data.pairs import RetrievalSet
from networks.clip_model import ModelFactory
from networks.image_encoder import build_image_encoder
from networks.lora import Lora
from tests.unroll import NAMES, Problem, check_chunks, relative_error, unroll_gradient
from utils.experts.trajectory import Trajectory, expert_path
from utils.matching import (
    OutOfMemory,
    Pairs,
    draw_batches,
    fit_pair_chunk,
    guarded,
    matching_gradient,
    prepare,
    to_device,
)
from utils.scoring import evaluate_retrieval
from utils.scoring.retrieval import retrieval_features
from utils.scoring.training import train_on_pairs
from utils.synset import load_synset

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]
CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def as_it_was():
    """Single precision without tf32 at the start; the scripts turn it on for the whole process."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@contextlib.contextmanager
def limited_to(num_bytes):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.mem_get_info(CARD)[1], CARD)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CARD)


# ---- the exact gradient


def make(encoder, **settings):
    drops = {"drop_path_rate": 0.2, "proj_drop_rate": 0.1} if encoder == "test_vit" else {}
    return Problem(encoder, device=CARD, **drops, **settings)


@pytest.mark.parametrize("student", [{}, {"momentum": 0.9}, {"momentum": 0.9, "adjoint_decay": 0.6}])
@pytest.mark.parametrize("pair_chunk", [None, 2])
@pytest.mark.parametrize("encoder", ["test_nfnet", "test_vit"])
def test_gradient_equals_the_full_unroll(encoder, pair_chunk, student):
    """In float64, with dropout; steps 1 to 3 of five start from a θ_t that was in the host's memory."""
    check_chunks(make(encoder).arguments(5), pair_chunk, **student)


@pytest.mark.parametrize("pair_chunk", [None, 2])
def test_gradient_with_adapters_and_with_a_frozen_text_tower(pair_chunk):
    check_chunks(make("test_vit", lora=Lora(2, 4.0, "all", "norm+bias")).arguments(3), pair_chunk)
    check_chunks(make("test_vit", freeze="text_projection").arguments(3), pair_chunk)


@pytest.mark.parametrize("pair_chunk", [None, 2])
def test_gradient_of_heads_over_a_frozen_encoder(pair_chunk):
    arguments = make("test_nfnet", freeze="image_encoder", image_projection=True).arguments(4)
    check_chunks(arguments, pair_chunk, unroll_gradient(*arguments, momentum=0.9), momentum=0.9)


def test_gradient_is_that_of_the_cpu():
    """Without dropout, whose masks differ between devices."""
    on_card, on_cpu = (Problem("test_nfnet", dropout=0.0, device=device) for device in (CARD, "cpu"))
    matching, expected = (matching_gradient(*problem.arguments(4), 2) for problem in (on_card, on_cpu))
    assert relative_error(matching.student_losses.cpu(), expected.student_losses) < 1e-10
    for name in NAMES:
        value = getattr(matching.gradient, name)
        assert value.is_cuda and relative_error(value.cpu(), getattr(expected.gradient, name)) < 1e-9, name


@pytest.mark.parametrize("pair_chunk", [None, 2])
@pytest.mark.parametrize(("precision", "cosine"), [("fp32", 0.99999), ("tf32", 0.999), ("bf16", 0.99)])
def test_precisions_are_close_to_float64(precision, cosine, pair_chunk):
    if precision != "fp32" and torch.cuda.get_device_capability(CARD) < (8, 0):
        pytest.skip("the card has no tf32 and bf16")
    problem = Problem("test_nfnet", dropout=0.0, device=CARD)
    expected = unroll_gradient(*problem.arguments(3))[1].image_syn.float()
    problem.single().model.bf16 = precision == "bf16"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    matching = matching_gradient(*problem.arguments(3), pair_chunk)
    assert {tensor.dtype for tensor in matching.gradient.tensors()} == {torch.float32}
    value = matching.gradient.image_syn
    assert torch.cosine_similarity(value.flatten(), expected.flatten(), dim=0) > cosine
    assert precision != "bf16" or relative_error(value, expected) > 1e-4


# ---- nobody waits


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed():
    value = torch.ones(1, device=CARD)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize("settings", [{}, {"freeze": "image_encoder", "image_projection": True}])
@pytest.mark.parametrize("pair_chunk", [None, 2])
@pytest.mark.parametrize("encoder", ["test_nfnet", "test_vit"])
def test_the_host_never_waits_in_the_sweep(encoder, pair_chunk, settings):
    problem = make(encoder, **settings).single()
    arguments = *problem.arguments(4), pair_chunk
    expected = matching_gradient(*arguments, momentum=0.9)  # loads kernels
    with no_waiting():
        matching = matching_gradient(*arguments, momentum=0.9)
    assert relative_error(matching.gradient.image_syn, expected.gradient.image_syn) < 1e-3


def test_snapshots_come_from_pinned_memory_in_the_layout_of_the_models():
    problem = Problem("test_nfnet")
    prepared = prepare(problem.start, CARD)
    assert all(value.is_pinned() for value in prepared.values())
    with no_waiting():
        moved = to_device(prepared, CARD)
    for name, value in moved.items():
        assert torch.equal(value.cpu(), problem.start[name]), name
        assert value.ndim < 4 or value.is_contiguous(memory_format=torch.channels_last), name


# ---- memory


def many_pairs(num_pairs=512, image_size=64):
    """A student in single precision, and more pairs than it holds at a time in 2 GB."""
    problem = make("test_nfnet").single()
    images = torch.randn(num_pairs, 3, image_size, image_size).to(CARD, memory_format=torch.channels_last)
    text_syn = torch.randn(num_pairs, problem.pairs.text_syn.shape[1]).to(CARD)
    return problem, Pairs(images, text_syn, problem.pairs.syn_lr_img, problem.pairs.syn_lr_txt)


def test_chosen_chunk_keeps_to_the_share_of_memory(capsys):
    problem, pairs = many_pairs()
    num_pairs, chunks = len(pairs.image_syn), []
    batches = draw_batches(num_pairs, num_pairs, 3, torch.Generator().manual_seed(0))
    for limit in (1e9, 2e9):
        with limited_to(limit):
            chunk = fit_pair_chunk(problem.loss_fn, problem.start, pairs, num_pairs, momentum=0.9)
            said = float(capsys.readouterr().out.split(" GB")[0].split()[-1])
            assert chunk is not None and said <= limit / 1e9
            torch.cuda.reset_peak_memory_stats(CARD)
            matching_gradient(problem.loss_fn, problem.start, problem.target, pairs, batches, 0, chunk, momentum=0.9)
            assert torch.cuda.max_memory_reserved(CARD) <= limit
            used = torch.cuda.max_memory_allocated(CARD)
            assert used > 0.3 * limit, f"a chunk of {chunk} leaves most of {limit / 1e9} GB unused: {used / 1e9} GB"
        chunks.append(chunk)
    assert 1 <= chunks[0] < chunks[1] < num_pairs


def fill_the_card(*args, **student):
    return torch.empty(2**50, dtype=torch.uint8, device=CARD)


def test_a_full_card_is_an_advice_and_its_memory_is_free_again():
    before = torch.cuda.memory_allocated(CARD)

    def fill_up():
        held = [torch.ones(2**20, device=CARD)]
        return held, fill_the_card()

    with pytest.raises(OutOfMemory, match="^CUDA is out of memory; give --pair_chunk 4$"):
        guarded(fill_up, lambda: "give --pair_chunk 4")
    assert torch.cuda.memory_allocated(CARD) == before


def test_a_gradient_beyond_the_limit_is_out_of_memory():
    problem, pairs = many_pairs()
    everything = [torch.arange(len(pairs.image_syn))] * 2
    arguments = problem.loss_fn, problem.start, problem.target, pairs, everything, 0
    with limited_to(5e8), pytest.raises(OutOfMemory, match="advice"):
        guarded(lambda: matching_gradient(*arguments), lambda: "advice")


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
    real, calls = distill.matching_gradient, []

    def second_is_full(*args, **student):
        calls.append(args)
        return (real if len(calls) == 1 else fill_the_card)(*args, **student)

    monkeypatch.setattr(distill, "matching_gradient", second_is_full)
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


def test_experts_are_augmented_on_the_card(tiny_argv, tmp_path, monkeypatch):
    seen, call = [], Augment.__call__
    monkeypatch.setattr(Augment, "__call__", lambda self, images: (seen.append(images.device), call(self, images))[1])
    argv = [
        "--cache_images",
        "--num_experts",
        "1",
        "--train_epochs",
        "2",
        "--batch_size_train",
        "60",
        "--disabled_wandb",
    ]
    folders = ["--buffer_path", str(tmp_path / "b"), "--cache_dir", str(tmp_path / "c")]
    rates = ["--lr_teacher_img", "0.01", "--device", "cuda"]
    assert buffer.main([*tiny_argv, *argv, *folders, *rates]) == 0
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
        loss = train_on_pairs(model, images_there, text_embed.to(device), 0.01, 0.01, 3, 4, 0.07, seed=5)
        features = retrieval_features(model, pictures, captions, 4, device)
        recall = evaluate_retrieval(model, test, captions, 4, device)
        found.append((loss, features[0].cpu(), features[1].cpu(), recall))
    (loss, *features, recall), (expected_loss, *expected, expected_recall) = found[1], found[0]
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    for value, wanted in zip(features, expected, strict=True):
        assert relative_error(value, wanted) < 1e-2
    assert recall["r_mean"] == pytest.approx(expected_recall["r_mean"], abs=5)  # one of ten pictures is ten per cent
