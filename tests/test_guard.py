"""What limits an iteration far outside what a run has seen, and the optimizers of the pairs."""

import pytest
import torch

from data.errors import InputError
from utils.matching import PairLearner
from utils.matching.guard import LEAST_SEEN, MEMORY, SKIPS, STILL_ASTRAY, Guard
from utils.sets import Pairs
from utils.student import Matching


def make_pairs(images=1.0, texts=1.0, lr_img=0.1, lr_txt=0.1):
    return Pairs(
        torch.full((2, 3, 1, 1), images), torch.full((2, 5), texts), torch.tensor(lr_img), torch.tensor(lr_txt)
    )


def make_matching(loss=1.0, student_losses=(3.0, 2.0), **gradient):
    loss = torch.tensor(loss)
    gradient = make_pairs(**{"lr_img": 0.0, "lr_txt": 0.0, **gradient})
    return Matching(loss, loss / 2, loss / 2, torch.tensor(student_losses), gradient)


def watch(guard, *matchings):
    """What comes through, and all lines."""
    gradients, lines = [], []
    for matching in matchings:
        gradient, said = guard.limit(matching, make_pairs(), len(gradients) + 1)
        gradients.append(gradient)
        lines += said
    return gradients, lines


def test_a_sane_gradient_passes_untouched():
    guard = Guard()
    matchings = [make_matching(images=float(n), lr_img=1.0 + n % 5) for n in range(1, 10)]
    gradients, lines = watch(guard, *matchings)
    assert all(g is m.gradient for g, m in zip(gradients, matchings, strict=True))
    assert guard.limited == 0 and lines == []


def test_an_outlier_is_cut_to_the_usual_norm():
    guard = Guard()
    usual = [make_matching(images=1.0 + 0.1 * n, texts=2.0, lr_img=0.5, lr_txt=0.1) for n in range(-2, 3)]
    *_, cut = watch(guard, *usual, make_matching(images=-300.0, texts=7.0, lr_img=-60.0, lr_txt=0.1))[0]
    assert torch.allclose(cut.image_syn, torch.full((2, 3, 1, 1), -1.0))  # the median
    assert (cut.text_syn == 7.0).all()
    assert cut.syn_lr_img == -0.5 and cut.syn_lr_txt == 0.1
    assert guard.limited == 1


def test_before_enough_is_seen_any_norm_is_let_through():
    guard = Guard()
    watch(guard, *[make_matching()] * (LEAST_SEEN - 1), make_matching(images=1e6))
    assert guard.limited == 0


def test_growth_that_stays_is_followed():
    """A run whose gradients become a hundred times larger for good is not held back for good."""
    guard = Guard()
    grown = [make_matching(images=100.0)] * (2 * MEMORY)
    *_, last = watch(guard, *[make_matching()] * MEMORY, *grown)[0]
    assert (last.image_syn == 100.0).all()


def test_a_step_at_most_doubles_or_halves_a_learned_rate():
    pairs = make_pairs(lr_img=0.1, lr_txt=0.02)
    learner = PairLearner(pairs, 0.1, 0.1, 0.01)
    rates = []
    for lr_img, lr_txt in ((30.0, -4.0), (-100.0, 0.1), (0.1, 0.1)):
        learner.step(make_pairs(lr_img=lr_img, lr_txt=lr_txt))
        rates.append((pairs.syn_lr_img.item(), pairs.syn_lr_txt.item()))
    # Halved, doubled; then SGD's step, its momentum that of the step that was taken: 0.1 + 0.01 (5 / 2 - 0.1)
    assert [rate for rate, _ in rates] == pytest.approx([0.05, 0.1, 0.124])
    assert rates[0][1] == pytest.approx(0.04)  # 0.06 is more than twice 0.02
    assert rates[1][1] == pytest.approx(0.04 + 0.01 * (2 / 2 - 0.1))
    assert learner.guard.limited == 3


def test_it_is_said_once_and_counted_always():
    guard = Guard()
    _, lines = watch(guard, *[make_matching(images=float("nan")), make_matching()] * 4)
    assert len(lines) == 1 and guard.limited == 4


@pytest.mark.parametrize("broken", [{"loss": float("nan")}, {"images": float("inf")}, {"lr_txt": float("nan")}])
def test_what_is_not_finite_is_left_out_until_it_comes_again_and_again(broken):
    guard = Guard()
    for _ in range(2):
        gradients, _ = watch(guard, *[make_matching(**broken)] * (SKIPS - 1), make_matching())
        assert all((part == 0).all() for gradient in gradients[:-1] for part in gradient.tensors())
    with pytest.raises(InputError, match="not finite at iteration 3.*lower"):
        watch(guard, *[make_matching(**broken)] * SKIPS)


def test_spoilt_pairs_end_the_run_at_once():
    with pytest.raises(InputError, match="not finite"):
        Guard().limit(make_matching(loss=float("nan")), make_pairs(images=float("nan")), 7)


def test_a_student_astray_is_said_at_the_start_and_after_a_while():
    assert "goes astray" in Guard().limit(make_matching(loss=5.0), make_pairs(), 0)[1][0]
    assert "goes astray" in Guard().limit(make_matching(student_losses=(2.0, 3.0)), make_pairs(), 0)[1][0]
    guard = Guard()
    _, lines = watch(guard, *[make_matching(loss=2.5)] * (STILL_ASTRAY - 1), make_matching(loss=1.9))
    assert lines == []
    _, lines = watch(guard, *[make_matching(loss=2.5)] * (2 * STILL_ASTRAY))
    assert len(lines) == 1 and "--student_temperature" in lines[0]


# ---- Adam


def test_an_optimizer_that_is_not_there_is_no_sgd():
    with pytest.raises(ValueError, match="unknown optimizer sgdm; there are sgd, adam"):
        PairLearner(make_pairs(), 0.1, 0.1, 0.01, "sgdm")


def test_adam_steps_in_standard_deviations_and_in_logarithms():
    """Against torch's Adam on the same variables."""
    generator = torch.Generator().manual_seed(0)
    images, texts = 3 * torch.randn(4, 3, 2, 2, generator=generator), 5 * torch.randn(4, 6, generator=generator)
    pairs = Pairs(images.clone(), texts.clone(), torch.tensor(0.1), torch.tensor(0.02))
    learner = PairLearner(pairs, 0.03, 0.01, 0.2, "adam")
    logs = torch.tensor([0.1, 0.02]).log()
    variables = [images.clone(), texts.clone(), logs[0].clone(), logs[1].clone()]
    rates = 0.03 * images.std().item(), 0.01 * texts.std().item(), 0.2, 0.2
    optimizer = torch.optim.Adam(
        [{"params": [v], "lr": lr} for v, lr in zip(variables, rates, strict=True)], betas=(0.9, 0.99)
    )
    for _ in range(3):
        gradient = Pairs(*(torch.randn(t.shape, generator=generator) for t in pairs.tensors()))
        variables[0].grad, variables[1].grad = gradient.image_syn, gradient.text_syn
        variables[2].grad = gradient.syn_lr_img * variables[2].exp()
        variables[3].grad = gradient.syn_lr_txt * variables[3].exp()
        learner.step(gradient)
        optimizer.step()
    expected = variables[0], variables[1], variables[2].exp(), variables[3].exp()
    for value, other in zip(pairs.tensors(), expected, strict=True):
        assert torch.allclose(value, other, rtol=1e-6)
    assert pairs.syn_lr_img != 0.1 and learner.iteration == 3


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_learner_goes_on_as_the_straight_one(optimizer, tmp_path):
    def gradients(start):
        return [make_pairs(float(n), 1.0 / n, 0.3 * n, -0.1 * n) for n in range(start, start + 3)]

    def take(learner, start):
        for gradient in gradients(start):
            learner.step(learner.guard.limit(make_matching(), learner.pairs, learner.iteration)[0])
            learner.step(gradient)

    def fresh():
        spread = make_pairs()
        spread.image_syn[0], spread.text_syn[0] = 2.0, 3.0
        return PairLearner(spread, 0.1, 0.2, 0.01, optimizer)

    straight, stopped, resumed = fresh(), fresh(), fresh()
    take(straight, 1)
    take(stopped, 1)
    stopped.save(tmp_path / "state", {})
    resumed.load(tmp_path / "state", {}, set())
    assert resumed.guard.state() == stopped.guard.state() and resumed.guard.norms
    take(straight, 4)
    take(resumed, 4)
    for left, right in zip(straight.pairs.tensors(), resumed.pairs.tensors(), strict=True):
        assert torch.equal(left, right)


def test_a_setting_that_older_states_lack(tmp_path):
    learner = PairLearner(make_pairs(), 0.1, 0.2, 0.01)
    learner.save(tmp_path / "state", {"seed": 0})
    learner.load(tmp_path / "state", {"seed": 0, "student_momentum": 0.0}, set(), {"student_momentum": 0.0})
    with pytest.raises(InputError, match="student_momentum=0.0"):
        learner.load(tmp_path / "state", {"seed": 0, "student_momentum": 0.9}, set(), {"student_momentum": 0.0})
