"""The report: a whole page of a run and of a table of sets, its numbers, and what happens where a part is missing."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from utils.log import Log
from utils.report import write_run_page
from utils.report.features import principal_plane, search_ranks
from utils.report.history import read_history
from utils.report.pairs import pair_group
from utils.scoring import nearest_with_cosine
from utils.synset import SynSet, load_synset, save_synset

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """A page's elements as (tag, attributes), its visible text, and its scripts; checks that tags are balanced."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.texts, self.scripts = [], [], [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        target = self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts
        target.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def charts(self):
        return [attributes["aria-label"] for attributes in self.of("svg")]


def picture(uri):
    """Pixels uint8 [3, H, W] of a data URI."""
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB")).transpose(2, 0, 1)


def pixels(synset):
    mean, std = (np.array(v, dtype=np.float64).reshape(3, 1, 1) for v in (synset.mean, synset.std))
    return (synset.image_syn.double().numpy() * std + mean).clip(0, 1)


def shown(folder):
    best = load_synset(folder / "best.safetensors")
    return best if best.settings["iteration"] else load_synset(folder / "last.safetensors")


def made_up(num, size, iteration=0, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(num, 3, size, size, generator=generator), torch.randn(num, 8, generator=generator)
    settings = {"method": "distilled" if iteration else "initial", "iteration": iteration, "dataset": "d", **settings}
    return SynSet(images, texts, 0.1, 0.1, [f"caption {i}" for i in range(num)], (0.5,) * 3, (0.25,) * 3, settings)


@pytest.fixture(scope="module")
def page(straight):
    return Page(straight / "report.html")


# ---- the page of a run


def test_page_needs_nothing_from_elsewhere(page):
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert not page.of("iframe") and not any("src" in script for script in page.of("script"))
    code = "".join(page.scripts)
    assert "@import" not in code and "url(" not in code and "http" not in code and "fetch(" not in code


def test_ids_are_unique_and_references_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [a[n][1:] for _, a in page.elements for n in ("href", "xlink:href") if a.get(n, "").startswith("#")]
    clips = re.findall(r"url\(#([^)]*)\)", " ".join(a.get("clip-path") or "" for _, a in page.elements))
    assert named and clips and {*named, *clips} <= set(ids)


def test_page_has_every_pair_before_and_after_and_the_difference(page, straight):
    first, last = load_synset(straight / "iteration_000000.safetensors"), shown(straight)
    before, after = pixels(first), pixels(last)
    uris = [image["src"] for image in page.of("img")]
    assert len(uris) == 3 * 6
    gain = float(re.search(r"multiplied by ([\d.]+)", page.text)[1])
    for i in range(6):
        shown_after, shown_before, difference = (picture(uri) / 255 for uri in uris[3 * i : 3 * i + 3])
        assert np.abs(shown_after - after[i]).max() < 0.51 / 255
        assert np.abs(shown_before - before[i]).max() < 0.51 / 255
        expected = (0.5 + gain * (after[i] - before[i])).clip(0, 1)
        assert np.abs(difference - expected).max() < 0.02 + 0.05 * np.abs(after[i] - before[i]).max()
    assert all(image["alt"].startswith(("Pair ", "Difference of pair ")) for image in page.of("img"))


def test_pairs_say_how_far_they_moved(page, straight):
    first, last = load_synset(straight / "iteration_000000.safetensors"), shown(straight)
    articles = page.of("article")
    distances = np.sqrt(((pixels(last) - pixels(first)) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose([float(a["data-picture"]) for a in articles], distances, rtol=1e-4)
    a, b = first.text_syn.double().numpy(), last.text_syn.double().numpy()
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose([float(a["data-text"]) for a in articles], 1 - cosine, atol=1e-6)


def test_captions_before_and_after_have_their_cosine(page, straight):
    known = json.loads((straight / "report.json").read_text())["nearest"]
    first, last = load_synset(straight / "iteration_000000.safetensors"), shown(straight)
    for synset in (first, last):
        nearest = known[str(synset.settings["iteration"])]
        assert [captions[0][0] for captions in nearest] == synset.captions
        assert all(len(captions) == 3 for captions in nearest)
        visible = [captions[: 3 if synset is last else 1] for captions in nearest]
        assert all(caption in page.text for captions in visible for caption, _ in captions)
    assert all(captions[0][1] == pytest.approx(1) for captions in known["0"])  # they start from real texts
    values = [float(data["value"]) for data in page.of("data")]
    assert len(values) == 6 * (1 + 3) and all(-1 <= value <= 1.000001 for value in values)


def test_curves_tell_what_was_measured(page, straight, metrics):
    lines = metrics(straight)
    recall = {line["step"]: line["r_mean"] for line in lines if "r_mean" in line}
    loss = [line["Grand_Loss"] for line in lines if "Grand_Loss" in line]
    titles = [chart.split(".")[0] for chart in page.charts()]
    assert len(titles) == 4 + 4 + 2
    mean, seconds = page.charts()[:2]
    for chart in (mean, seconds):
        assert f"from {recall[0]:.3g} to {recall[4]:.3g}" in chart and "± std over networks" in chart
        assert "initial pairs" in chart and "all data" in chart
    (matching,) = [chart for chart in page.charts() if chart.startswith("Matching loss")]
    assert f"both towers: from {loss[0]:.3g} to {loss[-1]:.3g} at 3" in matching
    assert "image tower" in matching and "text tower" in matching


def test_final_table_holds_the_test_recalls(straight, metrics):
    rows = json.loads((straight / "report.json").read_text())["test"]
    best = load_synset(straight / "best.safetensors").settings["iteration"]
    names = [row["set"] for row in rows]
    assert names[-2:] == [f"best, iteration {best}", "all data, the experts"]
    assert names[:-2] == (["initial pairs"] if best else [])
    assert rows[-2]["mean"]["r_mean"] == pytest.approx(metrics(straight)[-1]["Test/r_mean"])
    assert f"{rows[-1]['mean']['r_mean']:.1f} ± {rows[-1]['std']['r_mean']:.1f}" in Page(straight / "report.html").text


def test_rows_are_what_evaluate_measures(straight, experts, tmp_path, capsys):
    (first, *_, all_data) = json.loads((straight / "report.json").read_text())["test"]
    argv = ["--synset", str(straight / "iteration_000000.safetensors"), "--all_data", str(experts)]
    assert evaluate.main([*argv, "--json", str(tmp_path / "n.json")]) == 0
    expected = json.loads((tmp_path / "n.json").read_text())["rows"]
    for row, other in zip((first, all_data), expected, strict=True):
        assert row["mean"]["r_mean"] == pytest.approx(other["mean"]["r_mean"], abs=1e-4)


def test_search_data_fits_its_captions(straight, page):
    search = json.loads((straight / "report.json").read_text())["search"]
    assert len(search["captions"]) == len(search["pictures"]) == len(search["set"]) == len(search["expert"]) == 8
    for ranked in (*search["set"], *search["expert"]):
        assert len(set(ranked["first"])) == 5 and 1 <= ranked["rank"] <= 8
    for own, ranked in enumerate(search["expert"]):
        assert (ranked["first"].index(own) + 1 if own in ranked["first"] else 6) == min(ranked["rank"], 6)
    embedded = next(json.loads(text) for text in page.scripts if text.lstrip().startswith("{"))
    assert embedded == search


def test_coresets_are_compared(run_distill, straight, tmp_path, capsys):
    """Here the run's own initial pairs as if they were a coreset: its line is the initial one's."""
    coreset = tmp_path / "some_6.safetensors"
    shutil.copy(straight / "iteration_000000.safetensors", coreset)
    assert run_distill(tmp_path / "r", "--Iteration", 1, "--report", "--coreset", coreset) == 0
    known = json.loads((tmp_path / "r/report.json").read_text())
    initial = read_history(tmp_path / "r/metrics.jsonl").evaluations[0]["r_mean"]
    assert known["coresets"][0]["mean"]["r_mean"] == pytest.approx(initial)
    page = Page(tmp_path / "r/report.html")
    assert f"some_6: {initial:.3g}" in page.charts()[0]
    assert "some_6" in [row["set"] for row in known["test"]]


# ---- parts against independent computations


def test_nearest_captions_with_cosine():
    generator = np.random.default_rng(0)
    queries, texts = generator.normal(size=(4, 6)), generator.normal(size=(9, 6))
    captions = [*"abcdefgh", "a"]  # the first and the last row are one caption
    found = nearest_with_cosine(torch.tensor(queries), torch.tensor(texts), captions, num=3)
    unit = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in (queries, texts)]
    for row, cosines in zip(found, unit[0] @ unit[1].T, strict=True):
        best = {}
        for caption, cosine in zip(captions, cosines, strict=True):
            best[caption] = max(cosine, best.get(caption, -1))
        expected = sorted(best.items(), key=lambda item: -item[1])[:3]
        assert [name for name, _ in row] == [name for name, _ in expected]
        np.testing.assert_allclose([c for _, c in row], [c for _, c in expected], atol=1e-6)


def test_principal_plane_is_that_of_the_covariance():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1])
    mean, axes, explained = principal_plane(features)
    values, vectors = np.linalg.eigh(np.cov(features.double().numpy().T))
    np.testing.assert_allclose(explained, values[::-1][:2] / values.sum(), rtol=1e-4)
    np.testing.assert_allclose(np.abs(axes.double().numpy().T @ vectors[:, ::-1][:, :2]), np.eye(2), atol=1e-3)
    np.testing.assert_allclose(mean, features.mean(0))
    again = principal_plane(features.flip(0))[1]
    torch.testing.assert_close(again, axes)


def test_search_ranks_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(12, 4, generator=generator) for _ in range(2))
    for own, ranked in enumerate(search_ranks(images, texts)):
        scores = (images @ texts[own]).tolist()
        assert ranked["rank"] == 1 + sum(score > scores[own] for score in scores)
        assert ranked["first"] == sorted(range(12), key=lambda i: -scores[i])[:5]


def test_page_of_100_pairs_at_224_pixels_stays_below_15_mb(tmp_path):
    """Pictures of noise, which no compression helps: the worst case."""
    for name, iteration, seed in (("iteration_000000", 0, 0), ("best", 7, 1)):
        save_synset(tmp_path / f"{name}.safetensors", made_up(100, 224, iteration, seed))
    noise = base64.b64encode(np.random.default_rng(0).bytes(9000)).decode()  # of a thumbnail's size and more
    ranked = [{"first": [0, 1, 2, 3, 4], "rank": 1}] * 50
    search = {
        "iteration": 7,
        "pairs": 100,
        "captions": ["c" * 200] * 50,
        "pictures": [noise] * 50,
        "set": ranked,
        "expert": ranked,
    }
    points = {kind: np.random.default_rng(0).normal(size=(200, 2)).round(4).tolist() for kind in ("pictures", "texts")}
    places = {"explained": [0.5, 0.1], "real": points, "before": points, "after": points}
    (tmp_path / "report.json").write_text(json.dumps({"version": 1, "search": search, "map": places}))
    write_run_page(tmp_path)
    page = Page(tmp_path / "report.html")
    assert len(page.of("article")) == 100 and picture(page.of("img")[0]["src"]).shape[0] == 3
    assert (tmp_path / "report.html").stat().st_size < 15e6


def test_pictures_keep_their_size_where_there_is_room():
    smooth = made_up(2, 4)
    smooth.image_syn = torch.nn.functional.interpolate(smooth.image_syn, (300, 300), mode="bicubic")
    group = pair_group(smooth, smooth)
    assert group.side == 224 and picture(group.pairs[0]["after"]).shape == (3, 224, 224)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_light_and_dark(page):
    schemes = re.findall(r":root \{(.*?)\}", "".join(page.scripts), flags=re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", scheme))
        for text in ("ink", "muted", "blue", "orange", "green", "purple", "right"):
            for paper in ("paper", "panel"):
                high, low = sorted((luminance(colours[text]), luminance(colours[paper])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, paper)


# ---- what is missing, old, broken or hostile


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


@pytest.fixture
def error_line(capsys):
    def run(call, *argv):
        capsys.readouterr()
        assert call(*argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


def test_coresets_that_do_not_fit_are_one_line(run_distill, tmp_path, error_line):
    save_synset(tmp_path / "narrow.safetensors", made_up(2, 8))
    run = tmp_path / "r", "--Iteration", 1, "--report", "--coreset"
    assert "width 8" in error_line(run_distill, *run, tmp_path / "narrow.safetensors")
    assert "does not exist" in error_line(run_distill, *run, tmp_path / "none.safetensors")
    assert not (tmp_path / "r").exists()


def test_missing_plotting_library_is_one_line(run_distill, straight, tmp_path, error_line, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "matplotlib" in error_line(run_distill, tmp_path / "r", "--Iteration", 0, "--report")
    assert not (tmp_path / "r").exists()
    argv = ["--synset", str(straight / "best.safetensors"), "--report", str(tmp_path / "p.html")]
    assert "matplotlib" in error_line(evaluate.main, argv)


# ---- the page of a table, and wandb


def test_report_of_evaluated_sets(straight, tmp_path, capsys):
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


def test_report_that_cannot_be_written_is_one_line(straight, tmp_path, error_line):
    (tmp_path / "file").write_text("")
    argv = ["--synset", str(straight / "best.safetensors"), "--num_eval", "1", "--report"]
    assert "cannot write" in error_line(evaluate.main, [*argv, str(tmp_path / "file/page.html")])


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
