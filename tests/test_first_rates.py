"""First student rates that are fitted: against unrolls at the rates around them, and through distill.py."""

from dataclasses import replace

import pytest
import torch

from tests.programs import error_line
from tests.unroll import Problem, unroll_gradient
from utils.matching import fit_first_rates
from utils.matching.first_rates import MARGIN, RATES
from utils.sets import load_synset

BOTH = ["syn_lr_img", "syn_lr_txt"]
FROZEN = {"encoder": "test_nfnet", "freeze": "image_encoder", "image_projection": True}


@pytest.mark.parametrize(
    ("problem", "number", "names"),
    [({"encoder": "test_vit"}, 1, BOTH), (FROZEN, 2, BOTH), (FROZEN, 2, ["syn_lr_txt"])],
)
def test_a_larger_rate_would_lead_astray(problem, number, names):
    problem = Problem(**problem)
    segments = problem.segments(number, steps=2)

    def loss_at(**rates):
        rates = {name: torch.tensor(rate, dtype=torch.float64) for name, rate in rates.items()}
        pairs = replace(problem.pairs, **rates)
        unrolled = [
            unroll_gradient(problem.loss_fn, s.start, s.target, pairs, s.batches, s.seed, momentum=0.9)[0]
            for s in segments
        ]
        return sum(unrolled) / len(unrolled)

    before = [tensor.clone() for tensor in problem.pairs.tensors()]
    fitted = fit_first_rates(problem.loss_fn, segments, problem.pairs, names, 2, momentum=0.9)
    assert all(map(torch.equal, before, problem.pairs.tensors()))
    assert list(fitted) == names and loss_at(**fitted) <= 2 * MARGIN
    for name, rate in fitted.items():
        position = RATES.index(rate)
        assert 0 < position < len(RATES) - 1
        assert loss_at(**{**fitted, name: RATES[position + 1]}) > 2 * MARGIN


def test_a_tower_that_does_not_train_has_the_rate_of_the_other():
    problem = Problem("test_nfnet", freeze="text_projection")
    fitted = fit_first_rates(problem.loss_fn, problem.segments(1, 1), problem.pairs, BOTH)
    assert fitted["syn_lr_txt"] == fitted["syn_lr_img"] < RATES[-1]


def test_a_run_starts_with_them_and_can_be_resumed(run_distill, tmp_path, capsys):
    folder = tmp_path / "run"
    argv = ["--lr_teacher_img", "fit", "--lr_teacher_txt", 0.07]
    assert run_distill(folder, *argv, "--Iteration", 0) == 0
    first = load_synset(folder / "iteration_000000.safetensors")
    assert f"first student rates, fitted: {first.syn_lr_img:.3g} 0.07" in capsys.readouterr().out
    assert first.syn_lr_img == pytest.approx(min(RATES, key=lambda rate: abs(rate - first.syn_lr_img)))
    assert first.syn_lr_txt == pytest.approx(0.07)
    assert run_distill(folder, *argv, "--Iteration", 1, "--resume") == 0
    assert "fitted" not in capsys.readouterr().out
    resumed = load_synset(folder / "last.safetensors")
    assert first.syn_lr_img / 2 <= resumed.syn_lr_img <= first.syn_lr_img * 2
    assert resumed.syn_lr_img != first.syn_lr_img


def test_a_rate_is_a_number_or_fit(run_distill, tmp_path, capsys):
    line = error_line(capsys, run_distill, tmp_path / "run", "--lr_teacher_img", "fits")
    assert "--lr_teacher_img: 'fits' is not a number; give a number above 0 or fit" in line
