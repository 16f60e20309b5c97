"""On a CUDA card: the exact gradient, its precisions, waits of the host, and memory. Skipped where there is none."""

import contextlib
import gc

import pytest
import torch

from networks.lora import Lora
from tests.card import CARD, NEEDS_CARD, fill_the_card, full_precision  # noqa: F401, a fixture for every test
from tests.unroll import NAMES, Problem, check_chunks, relative_error, unroll_gradient
from utils.forms import OPERATIONS, PictureForm, Pyramid, view_normalised
from utils.matching import OutOfMemory, fit_room, guarded
from utils.sets import Pairs, draw_batches
from utils.student import matching_gradient, prepare, to_device

pytestmark = NEEDS_CARD


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


def test_views_and_their_gradient_are_those_of_the_cpu():
    """And of pixels held in a pyramid, near their start."""
    start = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    found = []
    for device in (CARD, torch.device("cpu")):
        form = PictureForm((0.4,) * 3, (0.2,) * 3, pyramid=Pyramid(24), limit=0.3, start=start.to(device))
        learned = (form.hold(form.start) + 0.1).requires_grad_()
        generator = torch.Generator().manual_seed(5)
        views = view_normalised(form.render(learned), form.mean, form.std, OPERATIONS, generator)
        found.append((views, torch.autograd.grad(views.square().sum(), learned)[0]))
    for on_card, on_cpu in zip(*found, strict=True):
        assert relative_error(on_card.cpu(), on_cpu) < 1e-5


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
            chunk = fit_room(problem.loss_fn, problem.start, pairs, num_pairs, 3, momentum=0.9).pair_chunk
            said = float(capsys.readouterr().out.split(" GB")[0].split()[-1])
            assert chunk is not None and said <= limit / 1e9
            torch.cuda.reset_peak_memory_stats(CARD)
            matching_gradient(problem.loss_fn, problem.start, problem.target, pairs, batches, 0, chunk, momentum=0.9)
            assert torch.cuda.max_memory_reserved(CARD) <= limit
            used = torch.cuda.max_memory_allocated(CARD)
            assert used > 0.3 * limit, f"a chunk of {chunk} leaves most of {limit / 1e9} GB unused: {used / 1e9} GB"
        chunks.append(chunk)
    assert 1 <= chunks[0] < chunks[1] < num_pairs


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
