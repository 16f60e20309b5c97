"""Rates chosen for the sets of a table, and how all of their networks train."""

import json
import math
from dataclasses import replace

import pytest

import coreset
import evaluate
from data.errors import InputError
from tests.programs import error_line, score_sets
from utils.scoring import NonFiniteLoss, choose_rates
from utils.sets import load_synset, save_synset, shown_path

QUICK = ["--num_eval", "1"]
GRIDS = [0.01, 0.1, 1.0], [0.01, 0.1, 1.0]


def peak_at(lr_img, lr_txt):
    """A recall that is highest at these rates."""
    return lambda rates: -abs(math.log(rates[0] / lr_img)) - abs(math.log(rates[1] / lr_txt))


def noted(recalls):
    """(recall of a set by name and rates, what it was asked)."""
    asked = {name: [] for name in recalls}
    return lambda name, rates: asked[name].append(rates) or recalls[name](rates), asked


def test_all_sets_have_the_same_distinct_candidates():
    """Own rates that are on the grid, as a coreset's are, and that are not."""
    recall, asked = noted({"coreset": peak_at(0.1, 0.1), "distilled": peak_at(0.05, 0.2)})
    best, lines = choose_rates({"coreset": (0.1, 0.1), "distilled": (0.05, 0.2)}, GRIDS, recall)
    assert asked["coreset"] == asked["distilled"] and len(set(asked["coreset"])) == len(asked["coreset"]) == 10
    assert best == {"coreset": (0.1, 0.1), "distilled": (0.05, 0.2)} and lines == []


def test_a_candidate_that_diverges_loses_and_is_said():
    def recall(name, rates):
        if rates[0] > 0.5:
            raise NonFiniteLoss(math.nan)
        return peak_at(0.5, 0.1)(rates)

    best, lines = choose_rates({"a": (0.1, 0.1)}, GRIDS, recall)
    assert best == {"a": (0.1, 0.1)}
    assert len(lines) == 3 and lines[0] == "a: rates of 1 0.01 diverge and are left out"


def test_a_set_that_always_diverges_is_named():
    def recall(name, rates):
        if name == "b":
            raise NonFiniteLoss(math.inf)
        return 1.0

    with pytest.raises(InputError, match="^b diverges at every candidate rate; give smaller --grid_img"):
        choose_rates({"a": (0.1, 0.1), "b": (0.1, 0.1)}, GRIDS, recall)


def test_a_grid_is_extended_for_all_sets_where_one_does_best_at_its_edge():
    recall, asked = noted({"a": peak_at(0.001, 0.1), "b": peak_at(0.1, 0.1)})
    best, lines = choose_rates({"a": (0.1, 0.1), "b": (0.1, 0.1)}, GRIDS, recall)
    assert asked["a"] == asked["b"] and asked["a"][9:] == [(0.001, 0.01), (0.001, 0.1), (0.001, 1.0)]
    assert best == {"a": (0.001, 0.1), "b": (0.1, 0.1)}
    (line,) = lines
    assert line.startswith("a: its best image rate, 0.001, is at the edge of what was tried, 0.001 to 1;")
    assert line.endswith("--grid_img")


def test_a_grid_is_extended_beyond_own_rates_that_win_outside_it():
    recall, asked = noted({"a": peak_at(0.5, 0.1)})
    best, lines = choose_rates({"a": (0.5, 0.1)}, ([0.01, 0.1], [0.01, 0.1, 1.0]), recall)
    assert {rates[0] for rates in asked["a"]} == {0.01, 0.1, 0.5, 5.0}
    assert best == {"a": (0.5, 0.1)} and lines == []


def test_a_grid_of_one_value_has_no_edge():
    recall, asked = noted({"a": peak_at(1e-4, 0.1)})
    _, lines = choose_rates({"a": (0.1, 0.1)}, ([0.1], [0.01, 0.1, 1.0]), recall)
    assert len(asked["a"]) == 3 and lines == []


# ---- one protocol for a table


@pytest.fixture(scope="module")
def sets(run_distill, tmp_path_factory):
    """A coreset, which says nothing of evaluation, and two distilled sets, by name."""
    folder = tmp_path_factory.mktemp("protocol")
    assert run_distill(folder / "run", "--Iteration", 0, "--num_eval", 1, "--no_draw", "--no_report") == 0
    synset = load_synset(folder / "run/best.safetensors")
    plain = {key: value for key, value in synset.settings.items() if key not in evaluate.PROTOCOL}
    made = {
        "coreset": plain | {"method": "random"},
        "a": plain | {"epoch_eval_train": 3, "batch_train": 4, "temperature": 0.1},
        "b": plain | {"epoch_eval_train": 2, "batch_train": 4, "temperature": 0.1},
    }
    for name, settings in made.items():
        save_synset(folder / f"{name}.safetensors", replace(synset, settings=settings))
    return lambda *names: ["--synset", *(str(folder / f"{name}.safetensors") for name in names), "--num_eval", "1"]


def protocol(path):
    numbers = json.loads(path.read_text())
    return [numbers[key] for key in evaluate.PROTOCOL], {
        row["method"]: row["mean"]["r_mean"] for row in numbers["rows"]
    }


def test_a_tables_protocol_is_that_of_its_distilled_sets_in_any_order(sets, tmp_path, capsys):
    found = []
    for number, names in enumerate([("coreset", "a"), ("a", "coreset")]):
        path = tmp_path / f"{number}.json"
        assert evaluate.main([*sets(*names), "--json", str(path)]) == 0
        found.append(protocol(path))
        assert "temperature 0.1, each trained 3 epochs in batches of 4 (as " in capsys.readouterr().out
    assert found[0] == found[1] and found[0][0] == [3, 4, 0.1, 0]


def test_a_coresets_temperature_is_that_of_its_expert_and_decides_nothing(sets, tiny_argv, tmp_path):
    output = str(tmp_path / "random.safetensors")
    chosen = ["--method", "random", "--num_queries", "6", "--temperature", "0.5", "--no_draw", "--output", output]
    assert coreset.main([*tiny_argv, *chosen]) == 0
    of_distilled = sets("a")[1]
    for files in ([output, of_distilled], [of_distilled, output]):
        args = evaluate.parse_args(["--synset", *files])
        assert [getattr(args, key) for key in evaluate.PROTOCOL] == [3, 4, 0.1, 0]
    args = evaluate.parse_args(["--synset", output])
    assert (args.temperature, args.protocol) == (0.07, "the defaults")


def test_flags_come_first_and_defaults_last(sets, tmp_path, capsys):
    assert evaluate.main([*sets("a", "b"), "--epoch_eval_train", "1", "--json", str(tmp_path / "t.json")]) == 0
    assert protocol(tmp_path / "t.json")[0] == [1, 4, 0.1, 0]
    assert "--epoch_eval_train is given, else as " in capsys.readouterr().out
    assert evaluate.parse_args(sets("coreset")).protocol == "the defaults"
    assert evaluate.parse_args(sets("coreset")).epoch_eval_train == 50


def test_distilled_sets_that_ask_for_different_protocols_are_refused(sets, tmp_path, capsys):
    line = error_line(capsys, score_sets, *sets("a", "b", "coreset"), "--json", tmp_path / "t.json")
    assert "give --epoch_eval_train (" in line and "a.safetensors: 3, " in line and "b.safetensors: 2)" in line
    assert not (tmp_path / "t.json").exists()


def test_views_of_a_table_are_those_of_its_distilled_sets(sets, tmp_path, capsys):
    """Of a set that does not say, from before the flag, none."""
    synset = load_synset(sets("a")[1])
    seen = str(tmp_path / "views.safetensors")
    save_synset(seen, replace(synset, settings={**synset.settings, "eval_views": 2}))
    coreset = sets("coreset")[1]
    assert evaluate.main(["--synset", coreset, seen, "--num_eval", "1", "--json", str(tmp_path / "t.json")]) == 0
    assert protocol(tmp_path / "t.json")[0] == [3, 4, 0.1, 2]
    assert "in batches of 4, a picture in one of 3 views an epoch (as " in capsys.readouterr().out
    line = error_line(capsys, score_sets, "--synset", sets("a")[1], seen)
    assert f"give --eval_views ({sets('a')[1]}: 0, {seen}: 2)" in line
    line = error_line(capsys, score_sets, *sets("a"), "--eval_views", -1)
    assert "--eval_views" in line and "less than 0" in line


def test_a_set_that_diverges_has_no_row_and_the_others_do(sets, tmp_path, capsys):
    diverging = str(tmp_path / "diverging.safetensors")
    synset = load_synset(sets("a")[1])
    save_synset(diverging, replace(synset, syn_lr_txt=1e30))
    assert evaluate.main(["--synset", sets("a")[1], diverging, *QUICK, "--json", str(tmp_path / "t.json")]) == 0
    assert f"no row for {diverging} on test_nfnet: training loss became" in capsys.readouterr().out
    assert [row["set"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]] == [shown_path(sets("a")[1])]
    line = error_line(capsys, score_sets, "--synset", diverging, *QUICK)
    assert line.startswith("error: no set could be trained on; give lower --syn_lr_img")


def test_sets_of_different_splits_do_not_share_a_table(sets, tmp_path, capsys):
    other = str(tmp_path / "other.safetensors")
    synset = load_synset(sets("a")[1])
    save_synset(other, replace(synset, settings={**synset.settings, "split_seed": 7}))
    line = error_line(capsys, score_sets, "--synset", sets("a")[1], other, "--texts", "nearest")
    assert f"{other} was made with split_seed=7, this run has split_seed=0" in line


@pytest.mark.parametrize("flag", ["--markdown", "--json", "--report"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_trained(sets, flag, tmp_path, capsys):
    for path, reason in ((tmp_path, "it is a folder"), (tmp_path / "file/t", "File exists")):
        (tmp_path / "file").touch()
        assert evaluate.main([*sets("a"), flag, str(path)]) == 2
        output = capsys.readouterr()
        assert output.err == f"error: cannot write {path} ({reason}); give another file\n" and not output.out


def test_a_page_that_fails_ends_nothing(sets, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise ValueError("no page today")

    monkeypatch.setattr(evaluate, "write_table_page", fail)
    files = ["--report", str(tmp_path / "page.html"), "--json", str(tmp_path / "t.json")]
    assert evaluate.main([*sets("a"), *files]) == 0
    assert "warning: the page left out, the run goes on (ValueError: no page today)" in capsys.readouterr().out
    assert (tmp_path / "t.json").exists() and not (tmp_path / "page.html").exists()
