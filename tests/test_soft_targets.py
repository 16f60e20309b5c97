"""What later methods add: soft targets, blending, minibatch orders, phases, averages and straight trajectories."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import distill
from networks.clip_model import LOSS
from networks.loss import PairLoss
from tests.programs import error_line, score_sets, table
from tests.unroll import Problem, check_chunks, unroll_gradient
from utils.experts import Shortcut, Trajectory
from utils.matching import PairLearner
from utils.matching.draws import Draws
from utils.scoring.training import make_optimizer
from utils.sets import Pairs, draw_batches, initial_similarity, load_synset, similarity_matrix
from utils.student import StudentLoss, matching_gradient
from utils.student.loss import blend


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- losses


@pytest.fixture
def features():
    return tuple(torch.nn.functional.normalize(normal(5, 7, seed=seed), dim=1) for seed in (1, 2))


@pytest.fixture
def soft():
    return torch.eye(5, dtype=torch.float64) + 0.3 * normal(5, 5, seed=3)


def by_entries(features, function):
    """[[function(logit of picture i and text j, i, j)]] at the temperature 0.1, in plain numbers."""
    logits = (features[0] @ features[1].T / 0.1).tolist()
    return [[function(z, i, j) for j, z in enumerate(row)] for i, row in enumerate(logits)]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def test_wbce_is_the_mean_over_like_pairs_and_over_the_rest(features, soft):
    s = soft.tolist()
    losses = by_entries(
        features,
        lambda z, i, j: -s[i][j] * math.log(sigmoid(z) + 1e-6) - (1 - s[i][j]) * math.log(1 - sigmoid(z) + 1e-6),
    )
    like = [losses[i][j] for i in range(5) for j in range(5) if s[i][j] > 0.5]
    rest = [losses[i][j] for i in range(5) for j in range(5) if s[i][j] <= 0.5]
    expected = (sum(like) / len(like) + sum(rest) / len(rest)) / 2
    assert PairLoss("WBCE", 0.1)(*features, soft).item() == pytest.approx(expected, rel=1e-10)


def test_bce_is_the_mean_cross_entropy_of_each_entry(features, soft):
    s = soft.tolist()
    losses = by_entries(
        features, lambda z, i, j: -s[i][j] * math.log(sigmoid(z)) - (1 - s[i][j]) * math.log(sigmoid(-z))
    )
    assert PairLoss("BCE", 0.1)(*features, soft).item() == pytest.approx(sum(map(sum, losses)) / 25, rel=1e-10)


def test_nce_is_a_cross_entropy_against_distributions(features, soft):
    z, s = by_entries(features, lambda z, i, j: z), soft.tolist()

    def cross_entropy(row, targets):
        weights = [math.exp(10 * t) for t in targets]
        total = sum(math.exp(v) for v in row)
        return -sum(w / sum(weights) * math.log(math.exp(v) / total) for w, v in zip(weights, row, strict=True))

    rows = [cross_entropy(z[i], s[i]) for i in range(5)]
    columns = [cross_entropy([z[i][j] for i in range(5)], [s[i][j] for i in range(5)]) for j in range(5)]
    assert PairLoss("NCE", 0.1)(*features, soft).item() == pytest.approx((sum(rows) + sum(columns)) / 10, rel=1e-10)


def test_nce_of_lors_takes_similarities_as_they_are(features, soft):
    """A row whose similarities add up to more weighs more."""
    z, s = by_entries(features, lambda z, i, j: z), soft.tolist()
    rows = [sum(s[i][j] * math.log(math.exp(z[i][j]) / sum(map(math.exp, z[i]))) for j in range(5)) for i in range(5)]
    columns = [
        sum(s[i][j] * math.log(math.exp(z[i][j]) / sum(math.exp(z[k][j]) for k in range(5))) for i in range(5))
        for j in range(5)
    ]
    expected = -(sum(rows) + sum(columns)) / 10
    assert PairLoss("NCE_LoRS", 0.1)(*features, soft).item() == pytest.approx(expected, rel=1e-10)
    identity = torch.eye(5, dtype=torch.float64)
    of_identity = PairLoss("NCE_LoRS", 0.1)(*features, identity).item()
    assert of_identity == pytest.approx(PairLoss(temperature=0.1)(*features).item(), rel=1e-10)


def test_siglip_is_the_loss_of_its_paper(features):
    """-log σ(label (scale x·y + bias)), all pairs, by the batch; label 1 for a pair of its own, -1 for another."""
    products, scale, bias = (features[0] @ features[1].T).tolist(), 7.0, -3.0
    losses = [
        -math.log(sigmoid((1 if i == j else -1) * (scale * product + bias)))
        for i, row in enumerate(products)
        for j, product in enumerate(row)
    ]
    learned = torch.tensor(math.log(scale)), torch.tensor(bias)
    assert PairLoss("SigLIP")(*features, None, *learned).item() == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_a_model_of_siglip_starts_at_the_scale_and_bias_of_its_paper(features):
    model = Problem("test_nfnet", loss_type="SigLIP").model
    expected = PairLoss("SigLIP")(*features, None, torch.tensor(10.0, dtype=torch.float64).log(), torch.tensor(-10.0))
    assert model.loss(*features).item() == pytest.approx(expected.item(), rel=1e-6)
    assert [name for name, tower in model.towers().items() if tower == LOSS] == ["logit_scale", "logit_bias"]
    rates = {group["lr"]: group["params"] for group in make_optimizer(model, 1.0, 2.0, 0, 0).param_groups}
    assert all(any(p is learned for p in rates[2.0]) for learned in (model.logit_scale, model.logit_bias))
    assert "logit_scale" not in dict(Problem("test_nfnet").model.named_parameters())


def test_a_learned_similarity_cannot_drive_nce_below_zero(features):
    similarity = torch.eye(5, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.SGD([similarity], lr=10.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = PairLoss("NCE", 0.1)(*features, similarity)
        loss.backward()
        optimizer.step()
    assert 0 <= loss.item() < PairLoss("NCE", 0.1)(*features).item()


@pytest.mark.parametrize("loss_type", ["NCE", "NCE_LoRS", "BCE", "WBCE"])
def test_without_a_similarity_targets_are_the_identity(features, loss_type):
    identity = torch.eye(5, dtype=torch.float64)
    assert torch.equal(PairLoss(loss_type, 0.1)(*features), PairLoss(loss_type, 0.1)(*features, identity))


def test_nce_of_the_identity_is_nearly_infonce(features):
    assert PairLoss("NCE", 0.1)(*features).item() == pytest.approx(
        PairLoss(temperature=0.1)(*features).item(), rel=1e-2
    )


# ---- the gradient


@pytest.mark.parametrize(
    ("sim_type", "loss_type", "momentum", "pair_chunk"),
    [
        ("lowrank", "WBCE", 0.9, None),
        ("lowrank", "WBCE", 0.0, 2),
        ("full", "NCE", 0.9, 2),
        ("full", "BCE", 0.0, None),
        ("full", "NCE_LoRS", 0.9, 2),
    ],
)
def test_gradient_of_soft_targets_equals_the_full_unroll(sim_type, loss_type, momentum, pair_chunk):
    """With dropout and mini-batches; that of S and of its factors too."""
    problem = Problem("test_nfnet", loss_type=loss_type).soft(sim_type)
    check_chunks(problem.arguments(3, batch_size=3), pair_chunk, momentum=momentum)


@pytest.mark.parametrize(("pair_chunk", "sim_type"), [(None, "none"), (2, "none"), (2, "lowrank")])
def test_gradient_with_a_learned_scale_and_bias_equals_the_full_unroll(pair_chunk, sim_type):
    problem = Problem("test_nfnet", loss_type="SigLIP").soft(sim_type)
    assert {"logit_scale", "logit_bias"} < problem.start.keys()
    check_chunks(problem.arguments(3), pair_chunk, momentum=0.9)


def frozen(blend_alpha=0.0):
    problem = Problem("test_nfnet", freeze="image_encoder", image_projection=True, loss_type="WBCE")
    problem.model.image_encoder.eval()
    problem.soft("lowrank").loss_fn.blend_alpha = blend_alpha
    return problem


def test_gradient_with_a_frozen_encoder_equals_the_full_unroll():
    check_chunks(frozen().arguments(4), None)


def test_blending_mixes_both_modalities_by_one_weight_and_one_order():
    torch.manual_seed(3)
    images, texts = normal(6, 4), normal(6, 3, seed=1)
    mixed = blend(images, texts, 0.7)
    torch.manual_seed(3)
    weight = torch.distributions.Beta(torch.tensor(0.7).double(), torch.tensor(0.7).double()).sample().item()
    order = torch.randperm(6)
    for got, rows in zip(mixed, (images, texts), strict=True):
        expected = torch.stack([weight * rows[i] + (1 - weight) * rows[order[i]] for i in range(6)])
        assert torch.allclose(got, expected, atol=1e-12)


def test_weights_of_blending_are_those_of_a_beta_distribution():
    torch.manual_seed(0)
    rows = torch.eye(2).double()
    weights = torch.stack([blend(rows, rows, 2.0)[0].amax() for _ in range(400)])
    # of the rows' own or of the other one's: max(w, 1 − w) with w ~ Beta(2, 2), or 1 where a row meets itself
    mixed = weights[weights < 1]
    assert 100 < len(mixed) < 300
    assert mixed.mean().item() == pytest.approx(0.6875, abs=0.02)


def test_gradient_with_blending_equals_the_full_unroll():
    """The oracle blends the encoder's output by its own lines, with the random numbers of the step."""
    problem = frozen(blend_alpha=1.0)
    arguments = problem.arguments(3)

    class Blended:
        alpha = problem.loss_fn.alpha

        def __call__(self, params, images, text_embed, targets):
            embed = problem.model.embed_images(images)
            one = torch.ones((), dtype=torch.float64)
            weight = torch.distributions.Beta(one, one).sample()
            order = torch.randperm(len(images))
            embed = weight * embed + (1 - weight) * embed[order]
            text_embed = weight * text_embed + (1 - weight) * text_embed[order]
            plain = StudentLoss(problem.model)
            return plain.of_features(params, plain.encode_image(params, embed), text_embed, targets)

    _, expected = unroll_gradient(Blended(), *arguments[1:])
    gradient = matching_gradient(*arguments).gradient.named()
    for name, exact in expected.named().items():
        assert (gradient[name] - exact).norm() <= 1e-10 * exact.norm(), name


# ---- similarity


@pytest.mark.parametrize("sim_type", ["full", "lowrank"])
def test_similarity_starts_as_the_identity(sim_type):
    parts = initial_similarity(sim_type, 6, 3, torch.Generator().manual_seed(0))
    assert torch.equal(similarity_matrix(parts, 3.0), torch.eye(6))
    parts = [part + torch.randn(part.shape) for part in parts]
    rows = torch.tensor([4, 1, 2])
    whole = similarity_matrix(tuple(parts), 3.0)
    assert torch.allclose(similarity_matrix(tuple(parts), 3.0, rows), whole[rows][:, rows], atol=1e-6)


# ---- minibatches and phases


def test_a_permutation_is_walked_through_before_the_next_begins():
    generator = torch.Generator().manual_seed(0)
    batches = draw_batches(10, 4, 7, generator, "permutation")
    assert [len(batch) for batch in batches] == [4] * 7
    for first, second in zip(batches[::2], batches[1::2], strict=False):
        assert len({*first.tolist(), *second.tolist()}) == 8
    assert len({tuple(batch.tolist()) for batch in batches}) == 7
    assert [len(batch) for batch in draw_batches(3, 8, 2, generator, "permutation")] == [3, 3]


class Epochs:
    """An expert whose snapshots are their numbers."""

    def snapshot(self, epoch):
        return {"w": torch.tensor([float(epoch)])}


def test_a_phase_draws_its_own_pairs_from_its_own_epochs():
    draws = Draws([Epochs()], 0, 10, 4, 2, 2, 3, phases=3, iterations=30)
    subsets, starts = [set(), set(), set()], [set(), set(), set()]
    for iteration in range(30):
        (segment,) = draws.read(iteration, torch.device("cpu"))
        start = segment.start_epoch
        assert segment.start["w"].item() == start and segment.target["w"].item() == start + 3
        subsets[iteration // 10].update(torch.cat(segment.batches).tolist())
        starts[iteration // 10].add(start)
    assert [sorted(s) for s in subsets] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert starts == [{0, 1}, {1, 2}, {2, 3}]
    assert [iteration for iteration in range(30) if draws.begins_phase(iteration)] == [10, 20]


def test_a_phase_of_all_is_no_phase():
    plain, one = Draws([Epochs()], 0, 10, 4, 2, 2, 3), Draws([Epochs()], 0, 10, 4, 2, 2, 3, phases=1, iterations=5)
    for iteration in range(5):
        (left,), (right,) = (draws.read(iteration, torch.device("cpu")) for draws in (plain, one))
        assert left.start_epoch == right.start_epoch and all(map(torch.equal, left.batches, right.batches))


# ---- average of the pairs


def make_learner(optimizer):
    images = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    texts = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    similarity = initial_similarity("lowrank", 4, 2, torch.Generator().manual_seed(1))
    pairs = Pairs(images, texts, torch.tensor(0.1), torch.tensor(0.2), similarity)
    return PairLearner(pairs, 0.1, 0.1, 0.01, optimizer, lr_sim=0.5, ema_decay=0.8)


def random_step(learner, number):
    generator = torch.Generator().manual_seed(number)
    learner.step(Pairs.of(torch.randn(t.shape, generator=generator) for t in learner.pairs.tensors()))


def copies(pairs):
    return {name: tensor.detach().clone() for name, tensor in pairs.named().items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_average_of_the_pairs_over_the_steps(optimizer, tmp_path):
    straight, passed = make_learner(optimizer), []
    for number in range(4):
        random_step(straight, number)
        passed.append(copies(straight.pairs))
        if number == 1:
            straight.save(tmp_path / "state.safetensors", {})
    weights = [0.8**3, 0.8**2, 0.8, 1]
    for name, tensor in straight.averaged.named().items():
        expected = sum(weight * pairs[name] for weight, pairs in zip(weights, passed, strict=True)) / sum(weights)
        assert torch.allclose(tensor, expected, atol=1e-6), name
        assert not torch.equal(tensor, straight.pairs.named()[name]), name

    resumed = make_learner(optimizer)
    resumed.load(tmp_path / "state.safetensors", {}, set())
    for number in (2, 3):
        random_step(resumed, number)
    for left, right in ((straight.averaged, resumed.averaged), (straight.pairs, resumed.pairs)):
        assert all(map(torch.equal, left.tensors(), right.tensors()))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_phase_is_a_run_from_the_average_before_it(optimizer, tmp_path):
    learner = make_learner(optimizer)
    for number in range(3):
        random_step(learner, number)
    learner.begin_phase()
    fresh = make_learner(optimizer)  # Adam's rates go on in standard deviations of its pairs, the first ones
    for name, average in learner.averaged.named().items():
        assert torch.equal(learner.pairs.named()[name], average)
        fresh.named[name].detach().copy_(average)
        if f"log_{name}" in fresh.moved:
            fresh.moved[f"log_{name}"].copy_(average.log())
    for number in (3, 4, 5):
        random_step(learner, number)
        random_step(fresh, number)
        if number == 4:
            learner.save(tmp_path / "state.safetensors", {})
    resumed = make_learner(optimizer)
    resumed.load(tmp_path / "state.safetensors", {}, set())
    random_step(resumed, 5)
    for other in (fresh, resumed):
        for left, right in ((learner.averaged, other.averaged), (learner.pairs, other.pairs)):
            assert all(map(torch.equal, left.tensors(), right.tensors()))


# ---- straight trajectories


def test_shortcut_is_a_line_divided_as_the_expert_moved(experts):
    path = sorted(experts.glob("tiny/*/*/expert_*.safetensors"))[0]
    expert = Trajectory(path)
    first, middle, last = (expert.snapshot(epoch) for epoch in range(3))
    straight = Shortcut(expert, 2)
    assert straight.epochs == [0, 1, 2]
    shares = []
    for name, value in straight.snapshot(1).items():
        before, after = (middle[name] - first[name]).norm(), (last[name] - middle[name]).norm()
        shares.append((before / (before + after)).item())
        assert torch.allclose(value, first[name] + shares[-1] * (last[name] - first[name]), atol=1e-6), name
    assert max(shares) - min(shares) > 0.01
    for epoch, stored in ((0, first), (2, last)):
        assert all(torch.allclose(value, stored[name], atol=1e-7) for name, value in straight.snapshot(epoch).items())


# ---- the scripts


SOFT = ["--loss_type", "WBCE", "--sim_type", "lowrank", "--sim_rank", 2, "--lr_sim", 0.1, "--lr_lr", 0, "--no_draw"]


def test_similarity_is_learned_saved_resumed_and_trained_on(run_distill, tmp_path, capsys):
    more = [*SOFT, "--ema_decay", 0.5, "--batch_order", "permutation", "--segments", 2]
    assert run_distill(tmp_path / "straight", "--Iteration", 3, *more) == 0
    assert run_distill(tmp_path / "parts", "--Iteration", 2, *more) == 0
    assert run_distill(tmp_path / "parts", "--Iteration", 3, *more, "--resume") == 0
    straight, parts = (load_synset(tmp_path / name / "last.safetensors") for name in ("straight", "parts"))
    assert straight.loss_type == "WBCE" and straight.alpha == 3.0 and len(straight.similarity) == 3
    assert all(map(torch.equal, straight.similarity, parts.similarity))
    assert torch.equal(straight.image_syn, parts.image_syn)
    assert not torch.equal(straight.targets, torch.eye(6))
    capsys.readouterr()
    assert score_sets("--synset", tmp_path / "straight/last.safetensors", "--num_eval", 1) == 0
    assert len(table(capsys.readouterr().out)[1]) == 1


def test_phases_are_trained_on_in_their_order(run_distill, tmp_path, capsys, experts):
    more = ["--phases", 2, "--max_start_epoch", 1, "--shortcut", 2, "--no_draw"]
    assert run_distill(tmp_path / "a", "--Iteration", 2, *more) == 0
    first, last = (load_synset(tmp_path / "a" / f"{name}.safetensors") for name in ("iteration_000000", "last"))
    assert last.phases == 2
    assert all((last.image_syn[i] != first.image_syn[i]).any() for i in range(6))
    line = error_line(capsys, run_distill, tmp_path / "a", "--Iteration", 4, *more, "--resume")
    assert "saved with Iteration=2" in line


def test_what_a_phase_learned_stays_its_average(run_distill, tmp_path):
    more = ["--phases", 2, "--max_start_epoch", 1, "--shortcut", 2, "--ema_decay", 0.5, "--no_draw"]
    assert run_distill(tmp_path, "--Iteration", 4, "--eval_it", 2, *more) == 0
    middle, last = (load_synset(tmp_path / f"{name}.safetensors") for name in ("iteration_000002", "last"))
    assert torch.equal(last.image_syn[:3], middle.image_syn[:3]) and torch.equal(last.text_syn[:3], middle.text_syn[:3])
    assert all((last.image_syn[i] != middle.image_syn[i]).any() for i in (3, 4, 5))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sim_type", "full"], ["--loss_type InfoNCE", "WBCE"]),
        (["--blend_alpha", 1], ["--blend_alpha", "--image_trainable False"]),
        (["--phases", 7], ["--phases 7", "6 pairs"]),
        (["--shortcut", 1], ["--shortcut 1", "epoch 2"]),
        (["--shortcut", 3], ["lacks the snapshots of epochs 3", "--shortcut 3"]),
        (["--recipe", "repblend"], ["image_trainable=True, this run has image_trainable=False"]),
    ],
)
def test_flags_that_do_not_go_together(run_distill, tmp_path, capsys, flags, words):
    line = error_line(capsys, run_distill, tmp_path / "run", *flags)
    assert all(word in line for word in words)
    assert not (tmp_path / "run").exists()


def test_damaged_similarity_is_one_line(run_distill, tmp_path, capsys):
    assert run_distill(tmp_path / "a", "--Iteration", 0, *SOFT) == 0
    path = tmp_path / "a/last.safetensors"
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    tensors["similarity_left"] = tensors["similarity_left"][:5].clone()
    save_file(tensors, path, metadata)
    assert "similarity has the shape" in error_line(capsys, score_sets, "--synset", path)
    tensors["similarity_left"] = torch.zeros(6, 2)
    save_file(tensors, path, {**metadata, "phases": "7"})
    assert "phases are 7 for 6 pairs" in error_line(capsys, score_sets, "--synset", path)


@pytest.mark.parametrize("recipe", ["lors", "repblend", "ptmst"])
def test_recipes_of_later_papers(recipe):
    args = distill.parse_args(["--recipe", recipe, "--dataset", "tiny"])
    assert args.loss_type == "WBCE" and args.num_queries == 99 and args.mini_batch_size == 20
    assert args.image_trainable == (recipe == "lors")
    assert args.sim_type == ("full" if recipe == "ptmst" else "lowrank")


# ---- a loss that learns, from experts to evaluation


def test_siglip_from_experts_to_evaluation(run_buffer, run_distill, experts, tmp_path, capsys):
    siglip = "--loss_type", "SigLIP"
    buffers, run = tmp_path / "B", tmp_path / "run"
    assert run_buffer(buffers, *siglip, "--num_experts", 2) == 0
    (path,) = buffers.glob("**/expert_000.safetensors")
    first, last = (Trajectory(path).snapshot(epoch) for epoch in (0, 1))
    assert first["logit_bias"] == -10 != last["logit_bias"] and first["logit_scale"] != last["logit_scale"]
    assert run_distill(run, "--Iteration", 2, "--buffer_path", buffers, *siglip, "--report") == 0
    capsys.readouterr()
    assert score_sets("--synset", run / "best.safetensors", "--all_data", buffers) == 0
    assert table(capsys.readouterr().out)[1][-1][0].startswith("all data")

    for stored, folder, asked in (("SigLIP", buffers, "WBCE"), ("InfoNCE", experts, "SigLIP")):
        line = error_line(capsys, run_distill, tmp_path / "x", "--buffer_path", folder, "--loss_type", asked)
        assert "SigLIP learns a scale and a bias" in line and f"give --loss_type {stored}, or" in line
    assert "loss_type=SigLIP" in error_line(capsys, run_buffer, buffers, "--loss_type", "InfoNCE")
    assert not (tmp_path / "x").exists()
