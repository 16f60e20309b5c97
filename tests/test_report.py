"""The report of a run: one whole page that needs nothing else, and what it shows."""

import json
import re
import shutil

import numpy as np
import pytest

import evaluate
from tests.report_page import Page, picture, pixels
from utils.report import write_run_page
from utils.report.folder import read_history
from utils.sets import load_synset


def shown(folder):
    best = load_synset(folder / "best.safetensors")
    return best if best.settings["iteration"] else load_synset(folder / "last.safetensors")


@pytest.fixture(scope="module")
def page(straight):
    return Page(straight / "report.html")


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
    assert all(image["width"] == image["height"] == "32" for image in page.of("img"))  # nothing jumps while they load


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


def test_coresets_are_compared(run_distill, straight, tmp_path, request):
    """Here the run's own initial pairs as if they were a coreset: its line is the initial one's."""
    coreset = tmp_path / "some_6.safetensors"
    shutil.copy(straight / "iteration_000000.safetensors", coreset)
    assert run_distill(tmp_path / "r", "--Iteration", 1, "--report", "--coreset", coreset) == 0
    request.getfixturevalue("rendered")
    write_run_page(tmp_path / "r")
    known = json.loads((tmp_path / "r/report.json").read_text())
    initial = read_history(tmp_path / "r/metrics.jsonl").evaluations[0]["r_mean"]
    assert known["coresets"][0]["mean"]["r_mean"] == pytest.approx(initial)
    page = Page(tmp_path / "r/report.html")
    assert f"some_6: {initial:.3g}" in page.charts()[0]
    assert "some_6" in [row["set"] for row in known["test"]]


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
