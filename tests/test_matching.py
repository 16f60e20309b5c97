"""The matching loss and its gradient, against a plain unroll of all steps and against finite differences."""

import pytest
import torch

from benchmarks.measure import peak_memory
from networks.clip_model import IMAGE, TEXT
from networks.lora import Lora
from tests.unroll import BATCH_SIZE, NAMES, NUM_PAIRS, Problem, check_chunks, relative_error, unroll_gradient
from utils.sets import Pairs, draw_batches
from utils.student import Keep, graph_bytes, matching_gradient, matching_loss

NFNET = {"encoder": "test_nfnet"}
VIT = {"encoder": "test_vit", "drop_path_rate": 0.2, "proj_drop_rate": 0.1}  # dropout in its image tower too


@pytest.fixture(scope="module")
def nfnet():
    return Problem(**NFNET)


@pytest.fixture(scope="module")
def vit():
    return Problem(**VIT)


@pytest.mark.parametrize(
    ("encoder", "steps"), [("nfnet", 1), ("nfnet", 2), ("nfnet", 3), ("vit", 1), ("vit", 2), ("vit", 8)]
)
def test_gradient_equals_the_full_unroll(encoder, steps, request):
    """With dropout on, and mini-batches smaller than the set."""
    arguments = request.getfixturevalue(encoder).arguments(steps)
    loss, expected = unroll_gradient(*arguments)
    matching = matching_gradient(*arguments)
    assert matching.loss.dtype == torch.float64
    assert relative_error(matching.loss, loss) < 1e-10
    for name in NAMES:
        assert relative_error(getattr(matching.gradient, name), getattr(expected, name)) < 1e-10, name


# ---- graphs that are kept


@pytest.mark.parametrize("graphs", [2, 3, 9])
@pytest.mark.parametrize(("encoder", "student"), [("nfnet", {}), ("vit", {"momentum": 0.9, "adjoint_decay": 0.6})])
def test_kept_graphs_change_no_bit(encoder, student, graphs, request):
    arguments = request.getfixturevalue(encoder).arguments(3)
    expected = matching_gradient(*arguments, **student)
    found = matching_gradient(*arguments, **student, keep=Keep(graphs, params=True))
    assert torch.equal(found.loss, expected.loss)
    for name in NAMES:
        assert torch.equal(getattr(found.gradient, name), getattr(expected.gradient, name)), name


def test_a_kept_graph_takes_as_much_memory_as_is_said():
    """Against the peak that torch's allocator tells, with one graph more; θ_t is there anyway, on a CPU."""
    loss_fn, start, target, pairs, batches, seed = arguments = Problem(**NFNET).single().arguments(3)
    cpu = torch.device("cpu")
    one, two = (peak_memory(lambda k=k: matching_gradient(*arguments, keep=Keep(k)), cpu) for k in (1, 2))
    params = sum(value.nbytes for value in start.values())
    assert two - one == pytest.approx(graph_bytes(loss_fn, start, pairs, batches[0]) - params, rel=0.02)


# ---- chunks of pairs


# Pairwise: every value of a column meets every value of each other one. A pair at a time, chunks that divide the batch,
# a smaller last chunk, and all at once; an image tower without dropout and with it; momentum; a damped λ (0.6 and 0 as
# one value); all weights or adapters; the loss of hard or of soft targets. Each kind of chunk has two rows, opposite
# in all these, and no two columns are equal or opposite in all four kinds.
PLAIN, ADAPTERS = None, Lora(2, 4.0, "all", "norm+bias")
CHUNKED = [
    (1, 5, NFNET, 0.0, 1.0, PLAIN, "InfoNCE"),
    (1, 4, VIT, 0.9, 0.6, ADAPTERS, "NCE"),
    (2, 4, NFNET, 0.9, 1.0, ADAPTERS, "InfoNCE"),
    (2, 4, VIT, 0.0, 0.0, PLAIN, "NCE"),
    (2, 5, NFNET, 0.0, 0.6, ADAPTERS, "InfoNCE"),
    (3, 5, VIT, 0.9, 1.0, PLAIN, "NCE"),
    (4, 4, NFNET, 0.9, 0.0, PLAIN, "NCE"),
    (7, 5, VIT, 0.0, 1.0, ADAPTERS, "InfoNCE"),
]


@pytest.mark.parametrize(("chunk", "batch", "encoder", "momentum", "adjoint_decay", "lora", "loss_type"), CHUNKED)
def test_chunks_give_the_gradient_of_the_full_unroll(chunk, batch, encoder, momentum, adjoint_decay, lora, loss_type):
    problem = Problem(**encoder, lora=lora, loss_type=loss_type)
    if loss_type == "NCE":
        problem.soft("lowrank")
    check_chunks(problem.arguments(3, batch_size=batch), chunk, momentum=momentum, adjoint_decay=adjoint_decay)


def test_without_dropout_in_the_image_tower_chunks_change_nothing(nfnet):
    arguments = nfnet.arguments(3, batch_size=NUM_PAIRS)
    check_chunks(arguments, 2, unroll_gradient(*arguments))


@pytest.mark.parametrize("freeze", ["image_encoder", "text_projection"])
def test_chunks_with_a_frozen_tower(freeze):
    check_chunks(Problem("test_vit", freeze=freeze).arguments(3, batch_size=NUM_PAIRS), 2)


def test_global_random_state_stays_as_it_is_with_chunks(nfnet):
    state = torch.get_rng_state()
    matching_gradient(*nfnet.arguments(2), 1)
    assert torch.equal(torch.get_rng_state(), state)


# ---- momentum, a damped adjoint, an image projection


@pytest.mark.parametrize("student", [{"momentum": 0.9}, {"adjoint_decay": 0.6}, {"adjoint_decay": 0.0}])
@pytest.mark.parametrize("encoder", ["nfnet", "vit"])
def test_momentum_and_adjoint_decay(encoder, student, request):
    check_chunks(request.getfixturevalue(encoder).arguments(3), None, **student)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_momentum_with_a_damped_adjoint(steps, vit):
    check_chunks(vit.arguments(steps), None, momentum=0.7, adjoint_decay=0.5)


def test_momentum_takes_the_steps_of_torchs_optimizer():
    """θ_T of SGD with momentum is where a student with target θ_T has no distance to go."""
    loss_fn, start, _, pairs, batches, seed = toy_problem(5)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [
        {"params": [leaves["image_encoder.weight"]], "lr": pairs.syn_lr_img.item()},
        {"params": [leaves["text_projection.weight"]], "lr": pairs.syn_lr_txt.item()},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    with torch.random.fork_rng():
        for step, batch in enumerate(batches):
            torch.manual_seed(seed + step)
            optimizer.zero_grad()
            loss_fn(leaves, pairs.image_syn[batch], pairs.text_syn[batch]).backward()
            optimizer.step()
    target = {name: value.detach() for name, value in leaves.items()}
    assert matching_gradient(loss_fn, start, target, pairs, batches, seed, momentum=0.9).loss < 1e-20


def test_an_image_projection_belongs_to_the_image_tower():
    problem = Problem("test_vit", image_projection=True)
    assert any(name.startswith("image_projection.") for name in problem.start)
    check_chunks(problem.arguments(3), None, momentum=0.9)
    check_chunks(problem.arguments(3), 2, momentum=0.9)


@pytest.mark.parametrize(
    ("image_projection", "pair_chunk"),
    [(True, None), (True, 1), (True, 2), (True, 3), (True, NUM_PAIRS + 1), (False, None), (False, 3)],
)
def test_frozen_pictures_are_embedded_once(image_projection, pair_chunk):
    """Against the unroll with the encoder in every step; one pair is in no batch."""
    problem = Problem("test_nfnet", freeze="image_encoder", image_projection=image_projection)
    loss_fn, *arguments, _, seed = problem.arguments(4)
    batches = draw_batches(NUM_PAIRS - 1, BATCH_SIZE, 4, torch.Generator().manual_seed(3))
    seen, encoder = [], problem.model.embed_images
    loss_fn.frozen_encoder = lambda images: seen.append(len(images)) or encoder(images)
    expected = unroll_gradient(loss_fn, *arguments, batches, seed, momentum=0.9)
    check_chunks((loss_fn, *arguments, batches, seed), pair_chunk, expected, momentum=0.9)
    used = NUM_PAIRS - 1
    again = 0 if pair_chunk is None or pair_chunk >= used else used - (used % pair_chunk or pair_chunk)
    assert sum(seen) == used + again  # the graph of the last chunk is kept


# ---- random numbers and arguments


@pytest.mark.parametrize("encoder", ["nfnet", "vit"])
def test_dropout_is_on_and_seeded(encoder, request):
    problem = request.getfixturevalue(encoder)
    first, again, other = (matching_gradient(*problem.arguments(2, seed)) for seed in (7, 7, 8))
    for left, right in zip(first.gradient.tensors(), again.gradient.tensors(), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(first.student_losses, again.student_losses)
    assert first.loss == again.loss
    assert (first.student_losses != other.student_losses).all()
    assert first.loss != other.loss


@pytest.mark.parametrize("pair_chunk", [1, 2])
def test_every_chunk_draws_masks_of_its_own(pair_chunk, monkeypatch):
    """The masks themselves: drawn from seeds that differ above bit 32 alone, a CPU's are all the same."""
    masks, dropout = [], torch.nn.functional.dropout

    def noted(values, p, training, inplace=False):
        mask = dropout(torch.ones_like(values), p, training)
        masks.append(mask.flatten()[:40].tolist())
        return values * mask

    monkeypatch.setattr(torch.nn.functional, "dropout", noted)
    problem = Problem("test_vit", proj_drop_rate=0.5, dropout=0.5)
    encode, firsts = problem.loss_fn.encode_image, []

    def first_mask(*args):
        before = len(masks)
        features = encode(*args)
        firsts.append(tuple(next(mask for mask in masks[before:] if 0.0 in mask)))
        return features

    problem.loss_fn.encode_image = first_mask
    matching_gradient(*problem.arguments(2, batch_size=4), pair_chunk)
    chunks = 2 * 4 // pair_chunk  # of two steps; each is computed several times, with the same mask
    assert len(firsts) > chunks and len(set(firsts)) == chunks


@pytest.mark.parametrize("pair_chunk", [None, 2])
@pytest.mark.parametrize("noise", ["dropout", "augmentation"])
def test_a_frozen_encoder_that_draws_is_exact(noise, pair_chunk):
    """Against differences of the loss along a direction."""
    problem = Problem("test_nfnet", freeze="image_encoder", image_projection=True)
    embed = problem.model.embed_images
    problem.loss_fn.frozen_encoder = {
        "dropout": lambda images: torch.nn.functional.dropout(embed(images), 0.5),
        "augmentation": lambda images: embed(images * (1 + 0.3 * torch.randn(len(images), 1, 1, 1).double())),
    }[noise]
    loss_fn, start, target, pairs, batches, seed = problem.arguments(3)
    direction = torch.randn(pairs.image_syn.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def matched(step):
        moved = Pairs(pairs.image_syn + step * direction, *pairs.tensors()[1:])
        return matching_gradient(loss_fn, start, target, moved, batches, seed, pair_chunk)

    expected = (matched(1e-5).loss - matched(-1e-5).loss) / 2e-5
    value = (matched(0.0).gradient.image_syn * direction).sum()
    assert abs(value - expected) < 1e-6 * abs(expected)


def test_without_dropout_the_seed_is_without_effect():
    problem = Problem("test_nfnet", dropout=0.0)
    assert matching_gradient(*problem.arguments(2, 7)).loss == matching_gradient(*problem.arguments(2, 8)).loss


def test_global_random_state_and_arguments_stay_as_they_are(nfnet):
    arguments = nfnet.arguments(2)
    kept = {name: value.clone() for name, value in nfnet.start.items()}
    pairs = [tensor.clone() for tensor in nfnet.pairs.tensors()]
    state = torch.get_rng_state()
    matching_gradient(*arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(nfnet.start[name], value) for name, value in kept.items())
    for tensor, before in zip(nfnet.pairs.tensors(), pairs, strict=True):
        assert torch.equal(tensor, before)
        assert not tensor.requires_grad
    assert all(p.grad is None for p in nfnet.model.parameters())


def test_student_losses_are_those_before_each_step(nfnet):
    loss_fn, start, target, pairs, batches, seed = nfnet.arguments(3)
    matching = matching_gradient(loss_fn, start, target, pairs, batches, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = loss_fn(start, pairs.image_syn[batches[0]], pairs.text_syn[batches[0]])
    assert matching.student_losses.shape == (3,)
    assert torch.allclose(matching.student_losses[0], first, rtol=1e-12, atol=0)
    assert torch.isclose(matching.image_loss + matching.text_loss, matching.loss, rtol=1e-12)


@pytest.mark.parametrize(
    ("frozen", "its_loss", "its_rate"),
    [("image_encoder", "image_loss", "syn_lr_img"), ("text_projection", "text_loss", "syn_lr_txt")],
)
def test_a_tower_that_does_not_train_counts_nothing(frozen, its_loss, its_rate):
    arguments = Problem("test_vit", freeze=frozen).arguments(3)
    matching = matching_gradient(*arguments)
    assert getattr(matching, its_loss) == 0
    assert getattr(matching.gradient, its_rate) == 0
    loss, expected = unroll_gradient(*arguments)
    assert relative_error(matching.loss, loss) < 1e-10
    for name in NAMES:
        if name != its_rate:
            assert relative_error(getattr(matching.gradient, name), getattr(expected, name)) < 1e-10, name


def test_an_expert_that_stood_still_in_a_tower_counts_nothing_there(nfnet):
    loss_fn, start, target, pairs, batches, seed = nfnet.arguments(2)
    target = {name: start[name] if name.startswith("image_encoder.") else value for name, value in target.items()}
    matching = matching_gradient(loss_fn, start, target, pairs, batches, seed)
    assert matching.image_loss == 0
    assert matching.loss == matching.text_loss > 0
    assert all(torch.isfinite(tensor).all() for tensor in matching.gradient.tensors())


def test_single_precision_in_channels_last():
    """As the scripts run it; without dropout, whose masks differ between the precisions."""
    problem = Problem("test_nfnet", dropout=0.0)
    expected = unroll_gradient(*problem.arguments(4))[1]
    gradient = matching_gradient(*problem.single().arguments(4)).gradient
    for name in NAMES:
        assert getattr(gradient, name).dtype == torch.float32
        assert relative_error(getattr(gradient, name).double(), getattr(expected, name)) < 1e-3, name


@pytest.mark.parametrize("pair_chunk", [None, 2])
def test_half_precision_is_close_and_leaves_single_precision(pair_chunk):
    problem = Problem("test_nfnet", dropout=0.0)
    expected = unroll_gradient(*problem.arguments(2))[1].image_syn.float()
    problem.single().model.bf16 = True
    matching = matching_gradient(*problem.arguments(2), pair_chunk)
    assert {tensor.dtype for tensor in matching.gradient.tensors()} == {torch.float32}
    assert matching.loss.dtype == torch.float32
    value = matching.gradient.image_syn
    assert torch.cosine_similarity(value.flatten(), expected.flatten(), dim=0) > 0.99
    assert relative_error(value, expected) > 1e-4


# ---- a problem small enough to follow by hand


def toy_loss(params, images, text_embed):
    """Two linear towers; dropout on the text."""
    image_features = torch.tanh(images.flatten(1) @ params["image_encoder.weight"].T)
    text = torch.nn.functional.dropout(text_embed, 0.3)
    return ((image_features - text @ params["text_projection.weight"].T) ** 2).sum(1).exp().mean()


toy_loss.frozen_encoder = None
toy_loss.towers = {"image_encoder.weight": IMAGE, "text_projection.weight": TEXT}


def toy_problem(steps):
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / 2

    start = {"image_encoder.weight": normal(2, 12), "text_projection.weight": normal(2, 3)}
    target = {name: value + 0.3 * normal(*value.shape) for name, value in start.items()}
    rates = torch.tensor(0.02, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)
    pairs = Pairs(normal(4, 3, 2, 2), normal(4, 3), *rates)
    return toy_loss, start, target, pairs, draw_batches(4, 2, steps, generator), 11


@pytest.mark.parametrize("steps", [1, 4])
def test_gradient_equals_finite_differences(steps):
    loss_fn, start, target, pairs, batches, seed = toy_problem(steps)
    gradient = matching_gradient(loss_fn, start, target, pairs, batches, seed).gradient
    step = 1e-6
    for name in NAMES:
        values, analytic = getattr(pairs, name).view(-1), getattr(gradient, name).view(-1)
        numeric = torch.empty_like(analytic)
        for i in range(len(values)):
            losses, middle = [], values[i].item()
            for shifted in (middle + step, middle - step):
                values[i] = shifted
                losses.append(matching_gradient(loss_fn, start, target, pairs, batches, seed).loss)
            values[i] = middle
            numeric[i] = (losses[0] - losses[1]) / (2 * step)
        assert relative_error(analytic, numeric) < 1e-6, name


def test_one_step_by_hand():
    """θ̂ = θ − β ∇ℓ after a single step on the whole set, ℓ without dropout."""

    def loss_fn(params, images, text_embed):
        return (params["image_encoder.w"] * images.sum() + params["text_projection.w"] * text_embed.sum()).sum()

    loss_fn.frozen_encoder, loss_fn.towers = None, {"image_encoder.w": IMAGE, "text_projection.w": TEXT}
    start = {"image_encoder.w": torch.tensor([1.0]), "text_projection.w": torch.tensor([2.0])}
    target = {"image_encoder.w": torch.tensor([0.0]), "text_projection.w": torch.tensor([4.0])}
    pairs = Pairs(torch.full((1, 3, 1, 1), 1.0), torch.tensor([[2.0]]), torch.tensor(0.1), torch.tensor(0.5))
    matching = matching_gradient(loss_fn, start, target, pairs, [torch.tensor([0])], 0)
    # image: 1 - 0.1 * 3 = 0.7, distance 0.49 of 1; text: 2 - 0.5 * 2 = 1, distance 9 of 4.
    assert matching.image_loss.item() == pytest.approx(0.49)
    assert matching.text_loss.item() == pytest.approx(2.25)
    assert matching.student_losses.tolist() == pytest.approx([7.0])
    gradient = matching.gradient
    assert gradient.image_syn.flatten().tolist() == pytest.approx([2 * 0.7 * -0.1] * 3)
    assert gradient.text_syn.item() == pytest.approx(2 * (1 - 4) * -0.5 / 4)
    assert gradient.syn_lr_img.item() == pytest.approx(2 * 0.7 * -3)
    assert gradient.syn_lr_txt.item() == pytest.approx(2 * (1 - 4) * -2 / 4)


def test_matching_loss_by_hand():
    names = ("image_encoder.a", "image_encoder.b", "text_projection.a")
    start = dict(zip(names, torch.tensor([[1.0], [2.0], [3.0]]), strict=True))
    target = dict(zip(names, torch.tensor([[2.0], [4.0], [0.0]]), strict=True))
    student = dict(zip(names, torch.tensor([[2.0], [3.0], [9.0]]), strict=True))
    towers = dict(zip(names, (IMAGE, IMAGE, TEXT), strict=True))
    image_loss, text_loss = matching_loss(student, start, target, towers)
    assert image_loss.item() == pytest.approx((0 + 1) / (1 + 4))
    assert text_loss.item() == pytest.approx(81 / 9)
    assert sum(matching_loss(start, start, target, towers)) == 2  # a student that stays put
    assert sum(matching_loss(target, start, target, towers)) == 0


# ---- mini-batches


def test_batches_are_distinct_pairs_drawn_anew():
    batches = draw_batches(10, 4, 50, torch.Generator().manual_seed(0))
    assert len(batches) == 50
    assert all(len(batch) == len(set(batch.tolist())) == 4 for batch in batches)
    assert len({tuple(batch.tolist()) for batch in batches}) > 40
    assert set(torch.cat(batches).tolist()) == set(range(10))
    again = draw_batches(10, 4, 50, torch.Generator().manual_seed(0))
    assert all(torch.equal(left, right) for left, right in zip(batches, again, strict=True))


def test_a_batch_larger_than_the_set_is_the_set():
    (batch,) = draw_batches(3, 100, 1, torch.Generator().manual_seed(0))
    assert sorted(batch.tolist()) == [0, 1, 2]
