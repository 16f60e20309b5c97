"""The table of the field at toy size, its scripts called in this process."""

import json

import pytest
import torch

import distill
import evaluate
from benchmarks import field
from utils.sets import load_synset

SCRIPTS = {"distill.py": distill, "evaluate.py": evaluate}


@pytest.fixture(scope="module")
def calls():
    return []


@pytest.fixture(scope="module")
def table(tiny_argv, experts, tmp_path_factory, calls):
    """Runs the benchmark into a folder that is the same for all calls."""
    output = tmp_path_factory.mktemp("field")
    quick = ["--syn_steps", "2", "--epoch_eval_train", "2", "--max_start_epoch", "1", "--image_trainable", "True"]
    same = ["--only_has_image_projection", "False", "--blend_alpha", "0", "--lr_lr", "0", "--lr_teacher_img", "0.01"]
    small = ["--lr_img", "0.01", "--lr_txt", "0.01", "--lr_sim", "0.01"]
    shared = [*tiny_argv, *quick, *same, *small, "--shortcut", "2", "--buffer_path", str(experts)]

    def run(script, argv, folder, needed):
        calls.append(script)
        argv = [str(value) for value in argv]
        assert SCRIPTS[script].main(argv) == 0
        return 1.0

    def start(*more):
        own = ["--output", str(output), "--pairs", "6", "--seconds", "0.01", "--num_eval", "1", *more]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(field, "run", run)
            patch.setattr(field, "PROTOCOL", {"epoch_eval_train": 2, "batch_train": 128})
            field.main([*own, "--", *shared])
        return output

    return start


ONE = "--recipes", "lors", "wu2024", "--gradients", "exact", "--seeds", "0"


def test_a_row_for_each_recipe_and_what_it_cost(table):
    output = table(*ONE)
    cells = {cell["recipe"]: cell for cell in json.loads((output / "table.json").read_text())}
    assert set(cells) == {"lors", "wu2024"}
    rows = (output / "table.md").read_text().splitlines()[2:]
    best = max(cells.values(), key=lambda cell: cell["mean"]["r_mean"])
    assert len(rows) == 2 and f"| {best['recipe']} |" in rows[0] and f"{best['mean']['r_mean']:.1f} ±" in rows[0]
    for name, cell in cells.items():
        assert cell["iterations"] == 4 and cell["pace"] > 0 and len(cell["rates"]) == 2
        seconds, recalls = zip(*cell["curve"], strict=True)
        assert seconds[0] == 0 and list(seconds) == sorted(seconds) and len(recalls) == 5, name
    assert (output / "curves.png").stat().st_size > 5000


def test_recipes_start_from_the_same_real_pairs(table):
    output = table(*ONE)
    lors, wu = (
        load_synset(output / f"{name}_exact_6_0/run/iteration_000000.safetensors") for name in ("lors", "wu2024")
    )
    assert len(lors.captions) == 5 and len(wu.captions) == 6  # the similarity takes the place of a pair
    assert torch.equal(lors.image_syn, wu.image_syn[:5])


def test_finished_cells_are_kept(table, calls):
    table(*ONE)
    calls.clear()
    table(*ONE)
    assert calls == []


def test_gradients_and_seeds_are_cells():
    own = ["--output", "x", "--pairs", "100", "200", "--seconds", "60", "90", "--recipes", "lors", "heads"]
    args = field.parse_args([*own, "--tesla_pairs", "100", "--", "--dataset", "demo"])
    cells = {cell["name"]: cell for cell in field.cells(args)}
    of_100 = {f"{r}_{g}_100_0" for r in ("lors", "heads") for g in ("exact", "TESLA")}
    assert set(cells) == {*of_100, "lors_exact_200_0", "heads_exact_200_0", "lors_exact_100_1", "heads_exact_100_1"}
    given = distill.parse_args([str(flag) for flag in field.flags(cells["lors_TESLA_100_0"], args)])
    assert (given.adjoint_decay, given.num_queries, given.dataset, given.loss_type) == (0, 99, "demo", "WBCE")
    given = distill.parse_args([str(flag) for flag in field.flags(cells["heads_exact_100_1"], args)])
    assert (given.adjoint_decay, given.num_queries, given.seed, given.segments) == (1, 99, 1, 4)
    given = distill.parse_args([str(flag) for flag in field.flags(cells["heads_exact_200_0"], args)])
    assert (given.num_queries, given.segments, given.lr_img, given.lr_txt, given.sim_rank) == (199, 2, 1000, 1000, 5)


def test_every_cell_is_scored_by_one_protocol():
    """Those of a recipe without lengths of its own too."""
    own = ["--output", "x", "--seconds", "60", "--gradients", "exact", "--seeds", "0", "--", "--dataset", "demo"]
    args = field.parse_args(own)
    given = [distill.parse_args([str(flag) for flag in field.flags(cell, args)]) for cell in field.cells(args)]
    assert len(given) == len(field.RECIPES)
    assert {(a.epoch_eval_train, a.batch_train, a.temperature) for a in given} == {(100, 128, 0.07)}


def test_a_budget_for_each_number_of_pairs(capsys):
    with pytest.raises(SystemExit):
        field.parse_args(["--output", "x", "--pairs", "100", "200", "--seconds", "60"])
    assert "1 values for 2 numbers of pairs" in capsys.readouterr().err
