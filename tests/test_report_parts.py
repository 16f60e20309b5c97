"""Parts of the report against independent computations, and the size of the page."""

import base64
import json

import numpy as np
import pytest
import torch

from tests.report_page import Page, made_up, picture
from utils.report import write_run_page
from utils.report.features import principal_plane, search_ranks
from utils.report.pairs import pair_group
from utils.scoring import nearest_with_cosine
from utils.sets import save_synset


@pytest.mark.parametrize("block", [4096, 2])
def test_nearest_captions_with_cosine(monkeypatch, block):
    monkeypatch.setattr("utils.scoring.retrieval.BLOCK", block)
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


def test_page_of_100_pairs_at_224_pixels_stays_below_15_mb(tmp_path, rendered):
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
