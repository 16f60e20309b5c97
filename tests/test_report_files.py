"""The report where something is missing, old, broken or hostile; of a table of sets; on wandb."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
from tests.programs import error_line
from tests.report_page import Page, made_up
from utils.log import Log
from utils.report import write_run_page
from utils.report.folder import read_history
from utils.sets import save_synset


def test_set_without_its_first_state_says_so(straight, tmp_path):
    shutil.copy(straight / "last.safetensors", tmp_path / "best.safetensors")
    write_run_page(tmp_path)
    page = Page(tmp_path / "report.html")
    assert "iteration_000000.safetensors, is not beside the set" in page.text
    assert len(page.of("img")) == len(page.of("article")) == 6
    assert "Nearest" not in page.text and not page.charts()


def test_older_folder_is_resumed(straight, run_distill, tmp_path):
    """One without seconds and report.json, whose set of the first evaluation remains."""
    assert run_distill(tmp_path / "r", "--Iteration", 2) == 0
    path = tmp_path / "r/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "Seconds"}) + "\n" for line in lines))
    assert run_distill(tmp_path / "r", "--Iteration", 4, "--resume", "--report") == 0
    page, whole = Page(tmp_path / "r/report.html"), Page(straight / "report.html")
    assert page.charts()[0] == whole.charts()[0]  # recall against iterations
    assert "Evaluations before iteration 4 wrote no time" in page.text
    assert [image["src"] for image in page.of("img")] == [image["src"] for image in whole.of("img")]


def test_page_is_made_again_from_the_run_folder(straight, tmp_path):
    folder = Path(shutil.copytree(straight, tmp_path / "r"))
    (folder / "report.html").unlink()
    write_run_page(folder)
    again, page = (Page(path / "report.html") for path in (folder, straight))
    assert again.charts() == page.charts() and again.of("img") == page.of("img")
    known = json.loads((folder / "report.json").read_text())
    for text in ('{"nearest": ', json.dumps({**known, "version": 0}), "[]"):  # then the page is made without it
        (folder / "report.json").write_text(text)
        write_run_page(folder)
        less = Page(folder / "report.html")
        assert less.of("img") == page.of("img") and len(less.charts()) == len(page.charts()) - 2


def test_page_is_written_whole_or_not_at_all(straight, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(straight, tmp_path / "r"))
    before = (folder / "report.html").read_text()
    write_text = Path.write_text

    def stop_halfway(self, text, *args, **kwargs):
        write_text(self, text[: len(text) // 2], *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        write_run_page(folder)
    assert (folder / "report.html").read_text() == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in straight.iterdir())


def test_line_that_was_cut_off_is_left_out_and_counted(straight, tmp_path):
    folder = Path(shutil.copytree(straight, tmp_path / "r"))
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + '{"step": 5, "Grand_Lo')
    write_run_page(folder)
    page = Page(folder / "report.html")
    assert "1 line(s) of metrics.jsonl could not be read" in page.text
    assert page.charts() == Page(straight / "report.html").charts()


def test_iterations_done_again_count_once(tmp_path):
    lines = [{"step": s, "Grand_Loss": v} for s, v in ((0, 2.0), (1, 1.9), (2, 1.8), (1, 1.7))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    history = read_history(tmp_path / "metrics.jsonl")
    assert {step: line["Grand_Loss"] for step, line in history.iterations.items()} == {0: 2.0, 1: 1.7, 2: 1.8}


def test_seconds_go_on_over_a_resume(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("utils.log.time.monotonic", lambda: now[0])
    for start, later in ((100.0, 130.0), (5000.0, 5002.0)):
        now[0] = start
        log = Log(tmp_path, {}, disabled_wandb=True)
        now[0] = later
        log({"x": 1}, step=0)
        log.finish()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step"')  # what a run that is cut off leaves
            file.write("\n")
    lines = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "Seconds" in line]
    assert [json.loads(line)["Seconds"] for line in lines] == [30, 32]


def test_words_of_others_are_shown_as_words(tmp_path):
    synset = made_up(2, 8, iteration=3, text_encoder="<b>&</b>")
    synset.captions = ['<script>alert("1")</script>', "a & b </script>"]
    save_synset(tmp_path / "best.safetensors", synset)
    write_run_page(tmp_path)
    page = Page(tmp_path / "report.html")
    assert '<script>alert("1")</script>' in page.text and "a & b </script>" in page.text
    assert "<b>&</b>" in page.text and not page.of("b") and len(page.of("script")) == 1


def test_coresets_that_do_not_fit_are_one_line(run_distill, tmp_path, capsys):
    save_synset(tmp_path / "narrow.safetensors", made_up(2, 8))
    run = tmp_path / "r", "--Iteration", 1, "--report", "--coreset"
    assert "width 8" in error_line(capsys, run_distill, *run, tmp_path / "narrow.safetensors")
    assert "does not exist" in error_line(capsys, run_distill, *run, tmp_path / "none.safetensors")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("missing", ["matplotlib.figure", "jinja2"])
def test_missing_library_of_the_report_is_one_line(run_distill, straight, tmp_path, capsys, monkeypatch, missing):
    """At the start: before anything is read or written."""
    monkeypatch.setitem(sys.modules, missing, None)
    name = missing.partition(".")[0]
    assert f"pip install {name}" in error_line(capsys, run_distill, tmp_path / "r", "--Iteration", 0, "--report")
    assert not (tmp_path / "r").exists()
    argv = ["--synset", str(straight / "best.safetensors"), "--report", str(tmp_path / "p.html")]
    assert f"pip install {name}" in error_line(capsys, evaluate.main, argv)


def test_an_error_in_the_page_is_one_warning_and_the_run_goes_on(run_distill, tmp_path, capsys, monkeypatch):
    def broken(*args):
        raise np.linalg.LinAlgError("Eigenvalues did not converge\nmore")

    monkeypatch.setattr("utils.report.run.principal_plane", broken)
    assert run_distill(tmp_path / "r", "--Iteration", 2, "--eval_it", 1, "--report") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line and "report" in line]
    assert lines == ["warning: report.html left out, the run goes on (LinAlgError: Eigenvalues did not converge)"]
    assert (tmp_path / "r/best.safetensors").exists()


def test_an_error_in_the_picture_grid_is_one_warning(run_distill, tmp_path, capsys, monkeypatch):
    def broken(*args):
        raise OSError("cannot write PNG")

    monkeypatch.setattr("distill.picture_grid", broken)
    assert run_distill(tmp_path / "r", "--Iteration", 2, "--eval_it", 1, "--draw", "--no_report") == 0
    assert capsys.readouterr().out.count("warning: the picture grid left out") == 1


# ---- the page of a table, and wandb


def test_report_of_evaluated_sets(straight, rendered, tmp_path, capsys):
    other = tmp_path / "elsewhere.safetensors"
    shutil.copy(straight / "iteration_000004.safetensors", other)
    sets = [str(straight / "last.safetensors"), str(straight / "iteration_000000.safetensors"), str(other)]
    report, numbers = tmp_path / "new/page.html", tmp_path / "numbers.json"
    argv = ["--synset", *sets, "--num_eval", "1", "--report", str(report), "--json", str(numbers)]
    assert evaluate.main(argv) == 0
    page = Page(report)
    assert len(page.of("article")) == 3 * 6
    assert len(page.of("img")) == 6 * 3 + 6 + 6 * 3  # the last one's first state is the table's initial set
    assert len(page.charts()) == 10  # of the first set's run
    for row in json.loads(numbers.read_text())["rows"]:
        assert f"{row['mean']['r_mean']:.1f} ± 0.0" in page.text
    assert "--num_eval 1" in page.text


def test_report_that_cannot_be_written_is_one_line(straight, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["--synset", str(straight / "best.safetensors"), "--num_eval", "1", "--report"]
    assert "cannot write" in error_line(capsys, evaluate.main, [*argv, str(tmp_path / "file/page.html")])


def test_wandb_offline_gets_table_and_page(run_distill, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run_distill(tmp_path / "r", "--Iteration", 1, "--report", "--disabled_wandb=false") == 0
    (page,) = tmp_path.glob("r/wandb/offline-run-*/files/media/html/Report_*.html")
    assert page.read_text() == (tmp_path / "r/report.html").read_text()
    (table,) = tmp_path.glob("r/wandb/offline-run-*/files/media/table/Final_Table_*.table.json")
    table = json.loads(table.read_text())
    rows = json.loads((tmp_path / "r/report.json").read_text())["test"]
    assert [row[0] for row in table["data"]] == [row["set"] for row in rows]
    assert table["columns"][-1] == "pictures" and len(rows) > 1
    (log,) = tmp_path.glob("r/wandb/offline-run-*/*.wandb")  # the pictures go with the table, in an artifact
    assert re.search(rb"media/images/\w+\.png", log.read_bytes())
