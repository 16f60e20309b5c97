"""Coresets against brute force, the counting of forgetting, coreset.py end to end, and the table of evaluate.py."""

import json
import os

import pytest
import torch
from safetensors import safe_open

import buffer
import coreset
import distill
import evaluate
import utils.scoring.features as features_module
from data.annotations import clean_caption
from data.errors import InputError
from networks.clip_model import CLIPModel
from networks.image_encoder import build_image_encoder
from tests.programs import error_line, table
from utils.files import save_tensors
from utils.forms import PairFeatures, pair_features
from utils.scoring.coresets import (
    ForgettingCounter,
    check_num_queries,
    herding,
    highest,
    kcenter,
    kmeans,
    prototypes,
    random_rows,
    spread_seeds,
)
from utils.scoring.features import embed_images
from utils.scoring.tables import COLUMNS
from utils.scoring.training import make_optimizer, train_epoch
from utils.sets import load_synset, save_synset
from utils.setup import data

QUICK = ["--num_queries", "5", "--train_epochs", "2", "--batch_size_train", "40", "--lr_teacher_img", "0.01"]


# ---- the choice, on features


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def small_data(seed, normalised=True):
    """Float64 features [40, 6] in groups of 1 to 5 rows, as captions of pictures are."""
    generator = seeded(seed)
    features = torch.randn(40, 6, generator=generator, dtype=torch.float64) + 0.3
    if normalised:
        features = torch.nn.functional.normalize(features, dim=1)
    sizes = torch.randint(1, 6, (40,), generator=generator)
    return features, torch.repeat_interleave(torch.arange(40), sizes)[:40]


def allowed_rows(groups, rows):
    taken = {groups[row].item() for row in rows}
    return [i for i in range(len(groups)) if groups[i].item() not in taken]


def held(features):
    """Features [40, D] as the methods take them."""
    return PairFeatures.of(features)


def brute_herding(features, groups, num):
    rows, scores = [], []
    mean = features.mean(dim=0)
    for _ in range(num):
        error = {i: (features[[*rows, i]].mean(dim=0) - mean).norm().item() for i in allowed_rows(groups, rows)}
        rows.append(min(error, key=error.get))
        scores.append(error[rows[-1]])
    return rows, scores


def brute_kcenter(features, groups, num):
    to_mean = (features - features.mean(dim=0)).norm(dim=1)
    rows = [to_mean.argmin().item()]
    scores = [to_mean[rows[0]].item()]
    while len(rows) < num:
        distance = {i: (features[i] - features[rows]).norm(dim=1).min().item() for i in allowed_rows(groups, rows)}
        rows.append(max(distance, key=distance.get))
        scores.append(distance[rows[-1]])
    return rows, scores


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("method, brute", [(herding, brute_herding), (kcenter, brute_kcenter)])
def test_greedy_choice_is_that_of_the_definition(method, brute, normalised):
    for seed in range(20):
        features, groups = small_data(seed, normalised)
        num = min(12, len(groups.unique()))
        rows, scores = method(held(features), groups, num)
        expected, expected_scores = brute(features, groups, num)
        assert rows == expected
        assert scores == pytest.approx(expected_scores, abs=1e-7)
        assert len(groups[rows].unique()) == num


def test_herding_is_welling_s_update_for_features_of_one_norm():
    features, groups = small_data(3)
    mean = features.mean(dim=0)
    weight, rows = mean.clone(), []
    for _ in range(8):
        gain = features @ weight
        rows.append(max(allowed_rows(groups, rows), key=lambda i: gain[i].item()))
        weight += mean - features[rows[-1]]
    assert herding(held(features), groups, 8)[0] == rows


def brute_centres(features, centres):
    """Lloyd's rounds from `centres` until nothing changes, a row at a time."""
    nearest = None
    while True:
        before, nearest = nearest, [min(range(len(centres)), key=lambda c: (x - centres[c]).norm()) for x in features]
        if nearest == before:
            return centres
        for c in range(len(centres)):
            own = [x for x, n in zip(features, nearest, strict=True) if n == c]
            centres[c] = sum(own) / len(own) if own else centres[c]


@pytest.mark.parametrize("normalised", [True, False])
def test_kmeans_is_lloyd_s(normalised, monkeypatch):
    monkeypatch.setattr("utils.forms.features.BLOCK", 7)
    for seed in range(8):
        features, groups = small_data(seed, normalised)
        num = min(9, len(groups.unique()))
        seeds = spread_seeds(held(features), features.square().sum(dim=1), num, seeded(seed))
        rows, scores = kmeans(held(features), groups, num, seeded(seed))
        for i, centre in enumerate(brute_centres(features, list(features[seeds]))):
            # The two rows of a cluster are equally near to its centre, but for rounding.
            distance = {row: (features[row] - centre).norm().item() for row in allowed_rows(groups, rows[:i])}
            assert distance[rows[i]] == pytest.approx(min(distance.values()), abs=1e-7)
            assert scores[i] == pytest.approx(distance[rows[i]], abs=1e-7)
    assert kmeans(held(features), groups, num, seeded(1))[0] != kmeans(held(features), groups, num, seeded(2))[0]


def test_prototypes_are_the_rows_of_kmeans_with_the_mean_texts_of_their_clusters():
    for seed in range(8):
        features, groups = small_data(seed)
        text_embed = torch.randn(40, 5, generator=seeded(seed))
        num = min(9, len(groups.unique()))
        choice, texts = prototypes(held(features), groups, num, seeded(seed), text_embed)
        assert choice == kmeans(held(features), groups, num, seeded(seed))
        seeds = spread_seeds(held(features), features.square().sum(dim=1), num, seeded(seed))
        centres = brute_centres(features, list(features[seeds]))
        own = [min(range(num), key=lambda c: (x - centres[c]).norm()) for x in features]
        for c in range(num):
            rows = [row for row in range(40) if own[row] == c]
            assert torch.allclose(texts[c], sum(text_embed[row] for row in rows) / len(rows), atol=1e-6)
        assert texts.dtype == torch.float32


def test_a_prototype_of_an_empty_cluster_has_its_own_text():
    """Two different features, six clusters: those that no row is nearest to."""
    groups, text_embed = torch.arange(6).repeat_interleave(3), torch.randn(18, 4)
    (rows, _), texts = prototypes(held(torch.eye(2).repeat(9, 2)), groups, 6, seeded(0), text_embed)
    means = [text_embed[kind::2].mean(dim=0) for kind in range(2)]
    assert sorted(groups[rows].tolist()) == list(range(6))
    of_cluster = [any(torch.allclose(text, mean, atol=1e-6) for mean in means) for text in texts]
    assert sum(of_cluster) == 2
    assert all(torch.equal(texts[i], text_embed[rows[i]]) for i in range(6) if not of_cluster[i])


def test_seeds_are_drawn_by_squared_distance():
    """From row 0, rows at distances 1, 2 and 3 are drawn 1 : 4 : 9, itself never; a fourth seed is the one left."""
    features = torch.tensor([[0.0], [1.0], [2.0], [3.0], [3.0]])
    drawn = [spread_seeds(held(features), features.square().sum(dim=1), 4, seeded(seed)) for seed in range(6000)]
    second = [rows[1] for rows in drawn if rows[0] == 0]
    shares = [second.count(row) / len(second) for row in range(5)]
    assert shares == pytest.approx([0, 1 / 23, 4 / 23, 9 / 23, 9 / 23], abs=0.04)
    assert all(sorted(features[rows, 0].tolist()) == [0, 1, 2, 3] for rows in drawn)


def test_empty_cluster_and_equal_features():
    """More centres than different rows: the pictures are filled all the same."""
    groups = torch.arange(6).repeat_interleave(3)
    for features in (torch.ones(18, 4), torch.eye(2).repeat(9, 2)):
        rows, scores = kmeans(held(features), groups, 6, seeded(0))
        assert sorted(groups[rows].tolist()) == list(range(6)) and scores == pytest.approx([0] * 6, abs=1e-3)


@pytest.mark.parametrize("method", [herding, kcenter])
def test_equal_features_fill_every_picture_once(method):
    groups = torch.arange(6).repeat_interleave(3)
    rows, scores = method(held(torch.ones(18, 4)), groups, 6)
    assert sorted(groups[rows].tolist()) == list(range(6))
    assert scores == pytest.approx([0] * 6, abs=1e-3)


def test_random_rows_are_distinct_pictures_of_random_captions():
    groups = torch.repeat_interleave(torch.arange(50), torch.randint(1, 7, (50,), generator=seeded(0)))
    rows = random_rows(groups, 50, seeded(1))
    assert sorted(groups[rows].tolist()) == list(range(50))
    assert rows == random_rows(groups, 50, seeded(1)) != random_rows(groups, 50, seeded(2))
    seen = {row for seed in range(100) for row in random_rows(groups, 50, seeded(seed))}
    assert seen == set(range(len(groups)))


def test_more_pairs_than_pictures():
    features, groups = small_data(0)
    many = len(groups.unique()) + 1
    calls = [
        lambda: herding(held(features), groups, many),
        lambda: kcenter(held(features), groups, many),
        lambda: kmeans(held(features), groups, many, seeded(0)),
        lambda: prototypes(held(features), groups, many, seeded(0), features),
        lambda: highest(features[:, 0], groups, many, seeded(0)),
        lambda: check_num_queries(many, many - 1),
    ]
    for call in calls:
        with pytest.raises(InputError, match=f"{many} is more than the {many - 1} "):
            call()


def test_highest_scores_one_per_picture_ties_by_seed():
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    scores = torch.tensor([5.0, 9.0, 7.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    chosen = [highest(scores, groups, 3, seeded(seed)) for seed in range(30)]
    assert all(rows[:2] == [1, 2] and values == [9, 7, 2] for rows, values in chosen)
    assert {rows[2] for rows, _ in chosen} == {4, 5, 6, 7}
    assert highest(scores, groups, 3, seeded(0)) == chosen[0]


# ---- forgetting


def test_forgetting_of_a_hand_made_sequence():
    #           matched at each presentation     events
    history = {
        0: ([1, 0, 1, 0], 2),
        1: ([1, 1, 1, 1], 0),
        2: ([0, 0, 0, 0], 4),  # never learned: as many as presentations
        3: ([0, 1, 0, 0], 1),  # forgotten once, not again while it stays so
        4: ([0, 0, 0, 1], 0),
    }
    counter = ForgettingCounter(torch.arange(5))
    for epoch in range(4):
        for rows in (torch.tensor([4, 0]), torch.tensor([2, 1, 3])):
            counter.count(rows, torch.tensor([bool(history[row][0][epoch]) for row in rows.tolist()]))
    assert counter.scores().tolist() == [events for _, events in history.values()]
    assert counter.forgotten.tolist() == [2, 0, 0, 1, 0]


def test_matched_is_both_ways_and_by_picture():
    """Rows 0 and 1 are captions of one picture."""
    counter = ForgettingCounter(torch.tensor([0, 0, 1, 2, 3, 4]))
    image_features = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0.9, 0.1], [0, 0, 1], [0, 0, 2]])
    text_features = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.1], [0, 0, 1], [0, 0, 0.4]])
    list(counter.watch([("images", torch.arange(6))]))
    counter.count_batch(image_features, text_features)
    # The image of row 1 is nearest to the text of row 0, of its own picture; that of row 3 to the text of row 2.
    # The image of row 4 is nearest to its own text, but that text to the image of row 5.
    assert counter.was_matched.tolist() == [True, True, True, False, False, False]


def test_watch_keeps_the_rows_of_the_batch_in_training():
    seen = []
    model = CLIPModel(torch.nn.Identity(), torch.nn.Linear(3, 2), image_projection=torch.nn.Linear(3, 2))
    counter = ForgettingCounter(torch.arange(6))
    loader = [(torch.randn(2, 3), torch.tensor(rows)) for rows in ([3, 1], [0, 5], [2, 4])]
    batches = ((images, torch.randn(2, 3)) for images, _ in counter.watch(loader))
    optimizer = make_optimizer(model, 0.1, 0.1, 0, 0)

    def on_batch(image_features, text_features):
        assert not image_features.requires_grad and image_features.shape == text_features.shape == (2, 2)
        seen.append(counter.rows.tolist())

    train_epoch(model, batches, optimizer, on_batch)
    assert seen == [[3, 1], [0, 5], [2, 4]]


# ---- features


def test_features_held_once_a_picture_are_those_of_a_matrix(monkeypatch):
    """Pictures without a caption of a block, blocks that begin within a picture, and rows of zeros."""
    monkeypatch.setattr("utils.forms.features.BLOCK", 7)
    image_embed, text_embed = (torch.randn(n, d, generator=seeded(n), dtype=torch.double) for n, d in ((9, 4), (40, 3)))
    image_embed[2] = text_embed[5] = 0
    row_to_image = torch.tensor([0, 1, 2, 4, 4, 6, 7, 8]).repeat_interleave(5)
    features = pair_features("joint", image_embed, text_embed, row_to_image)
    normalised = [torch.nn.functional.normalize(embed, dim=1) for embed in (image_embed, text_embed)]
    matrix = torch.cat([normalised[0][row_to_image], normalised[1]], dim=1)
    vectors, cluster = torch.randn(7, 6, dtype=torch.double), torch.randint(6, (40,))
    same = torch.testing.assert_close
    same(features[:], matrix)
    same(features[3], matrix[3])
    same(features[[30, 2]], matrix[[30, 2]])
    same(torch.cat([block[:] for block in features.blocks()]), matrix)
    same(torch.cat([block.products(vectors) for block in features.blocks()]), matrix @ vectors)
    same(features.products(vectors[:, 0]), matrix @ vectors[:, 0])
    same(features.mean(), matrix.mean(dim=0))
    same(features.squared_norms(), matrix.square().sum(dim=1))
    same(features.sums(cluster, 7), torch.stack([matrix[cluster == c].sum(dim=0) for c in range(7)]))


def test_features_of_pairs():
    image_embed, text_embed = torch.randn(3, 4), torch.randn(5, 2)
    row_to_image = torch.tensor([0, 0, 1, 2, 2])
    joint = pair_features("joint", image_embed, text_embed, row_to_image)[:]
    assert joint.shape == (5, 6)
    assert torch.equal(joint[:, :4], pair_features("image", image_embed, None, row_to_image)[:])
    assert torch.equal(joint[:, 4:], pair_features("text", None, text_embed, row_to_image)[:])
    assert torch.allclose(joint[:, :4].norm(dim=1), torch.ones(5))
    assert torch.allclose(joint[4, :4] * image_embed[2].norm(), image_embed[2])
    with pytest.raises(InputError, match="text encoder gives features that are not finite"):
        pair_features("joint", image_embed, text_embed * torch.nan, row_to_image)


def test_image_features_are_cached_by_weights_and_files(tiny_data, tmp_path, monkeypatch, capsys):
    paths = sorted(tiny_data.glob("demo-images/val_*.png"))
    loads = []
    load_images = features_module.load_images
    monkeypatch.setattr(features_module, "load_images", lambda p, size: loads.append(len(p)) or load_images(p, size))
    encoder = build_image_encoder("test_nfnet", 32, pretrained=False).train()

    def embed(files=paths, size=32, folder=tmp_path / "cache"):
        loads.clear()
        return embed_images(files, encoder, size, 2, "cpu", folder)

    first = embed()
    assert first.shape == (8, encoder.width) and loads == [2, 2, 2, 2] and encoder.training
    assert torch.equal(embed(), first) and not loads
    assert torch.allclose(embed(paths[:2]), first[:2], atol=1e-6) and loads
    embed(size=48)
    assert loads
    times = paths[0].stat()
    os.utime(paths[0], (times.st_atime, times.st_mtime + 10))
    embed()
    assert loads  # a file was written anew
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    assert not torch.equal(embed(), first) and loads  # other weights
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    assert len(embed()) == 8 and "anew" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert len(embed(folder=tmp_path / "file")) == 8 and "not cached" in capsys.readouterr().out


# ---- coreset.py


@pytest.fixture(scope="module")
def run_coreset(tiny_argv):
    return lambda *argv: coreset.main([*tiny_argv, *QUICK, *map(str, argv)])


@pytest.fixture(scope="module")
def sets(run_coreset, tmp_path_factory):
    """Folder with a set of each method."""
    folder = tmp_path_factory.mktemp("coresets")
    for method in coreset.METHODS:
        assert run_coreset("--method", method, "--save_dir", folder) == 0
    return folder


@pytest.mark.parametrize("method", coreset.METHODS)
def test_set_of_real_pairs(sets, method, tiny_data):
    path = sets / f"{method}_5.safetensors"
    synset = load_synset(path)
    captions = {}
    for row in json.loads((tiny_data / "tiny_train.json").read_text()):
        captions.setdefault(row["image"], []).append(clean_caption(row["caption"]))
    assert synset.image_syn.shape == (5, 3, 32, 32) and len(synset.text_syn) == 5
    assert len(set(synset.files)) == 5
    if method == "prototypes":  # the real captions nearest to what are no captions
        assert synset.files == load_synset(sets / "kmeans_5.safetensors").files and not synset.texts_are_captions
        assert set(synset.captions) <= {text for texts in captions.values() for text in texts}
        synset.captions = [captions[file][0] for file in synset.files]
    assert all(text in captions[file] for file, text in zip(synset.files, synset.captions, strict=True))
    assert len(synset.scores) == 5 and synset.settings["method"] == method
    assert (synset.syn_lr_img, synset.syn_lr_txt) == pytest.approx((0.01, 0.1))
    assert path.with_suffix(".png").exists()
    if method == "forgetting":
        assert synset.scores == sorted(synset.scores, reverse=True) and max(synset.scores) <= 2
    with safe_open(path, "pt") as file:
        assert {"files", "scores"} <= set(file.metadata())


def test_random_set_is_where_distillation_starts(sets, tiny_argv, experts, tmp_path):
    argv = ["--buffer_path", str(experts), "--save_dir", str(tmp_path / "run"), "--num_queries", "5"]
    few = ["--Iteration", "0", "--num_eval", "1", "--epoch_eval_train", "1", "--max_start_epoch", "1"]
    assert distill.main([*tiny_argv, *argv, *few, "--disabled_wandb", "--no_report"]) == 0
    start, chosen = load_synset(tmp_path / "run/last.safetensors"), load_synset(sets / "random_5.safetensors")
    assert torch.equal(start.image_syn, chosen.image_syn) and torch.equal(start.text_syn, chosen.text_syn)
    assert start.files == [] and start.scores == []


def test_set_written_before_files_and_scores_is_read(sets, tmp_path, monkeypatch):
    synset = load_synset(sets / "random_5.safetensors")

    def save_less(path, tensors, metadata):
        save_tensors(path, tensors, {k: v for k, v in metadata.items() if k not in ("files", "scores")})

    monkeypatch.setattr("utils.sets.synset.save_tensors", save_less)
    save_synset(tmp_path / "old.safetensors", synset)
    assert load_synset(tmp_path / "old.safetensors").files == []


@pytest.mark.parametrize("features", ["image", "text"])
def test_features_of_one_modality(run_coreset, sets, tmp_path, features):
    output = tmp_path / "new/set.safetensors"
    assert run_coreset("--method", "herding", "--features", features, "--output", output, "--no_draw") == 0
    assert load_synset(output).captions != load_synset(sets / "herding_5.safetensors").captions
    assert [path.name for path in output.parent.iterdir()] == ["set.safetensors"]


# ---- one modality alone


@pytest.mark.parametrize("flag, other", [("image", "text"), ("text", "image")])
def test_frozen_modality_stays_at_its_start(run_distill, tmp_path, flag, other):
    learned, frozen = f"{flag}_syn", f"{other}_syn"
    quick = "--Iteration", 3, "--eval_it", 3, "--num_eval", 1, "--epoch_eval_train", 1, "--lr_lr", 1e-2
    assert run_distill(tmp_path, *quick, f"--{flag}_only") == 0
    start, end = (load_synset(tmp_path / f"iteration_00000{i}.safetensors") for i in (0, 3))
    assert torch.equal(getattr(start, frozen), getattr(end, frozen))
    assert not torch.equal(getattr(start, learned), getattr(end, learned))
    assert start.syn_lr_img != end.syn_lr_img and start.syn_lr_txt != end.syn_lr_txt
    assert end.settings["method"] == f"distilled {flag}s"


# ---- the table


def run_evaluate(sets, names, *argv):
    paths = [str(sets / f"{name}_5.safetensors") for name in names]
    return evaluate.main(["--synset", *paths, "--num_eval", "2", "--epoch_eval_train", "1", *map(str, argv)])


def test_table_of_two_sets_and_two_encoders(sets, experts, tmp_path, capsys, monkeypatch):
    built, read = [], []
    make_factory, retrieval_pairs = evaluate.make_factory, evaluate.retrieval_pairs
    monkeypatch.setattr(
        evaluate,
        "make_factory",
        lambda a, *more, **how: built.append((a.image_encoder, a.image_checkpoint)) or make_factory(a, *more, **how),
    )
    monkeypatch.setattr(evaluate, "retrieval_pairs", lambda *a: read.append(a) or retrieval_pairs(*a))
    files = ["--markdown", tmp_path / "new/table.md", "--json", tmp_path / "new/table.json"]
    encoders = ["--image_encoder", "test_nfnet", "test_vit", "--no_image_pretrained", "--all_data", experts]
    capsys.readouterr()
    assert run_evaluate(sets, ["random", "herding"], *encoders, *files) == 0
    out = capsys.readouterr().out

    # The checkpoint belongs to the sets' own encoder alone; data are read once, each encoder is built once.
    assert [name for name, _ in built] == ["test_nfnet", "test_vit"]
    assert built[0][1].endswith("demo_nfnet.safetensors") and built[1][1] is None
    assert len(read) == 1
    assert "no all-data row for test_vit" in out
    head, rows = table(out)
    assert head == [*COLUMNS, "TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "mean"]
    assert [row[:3] for row in rows] == [
        ["random_5 (random)", "5", "test_nfnet"],
        ["herding_5 (herding)", "5", "test_nfnet"],
        ["all data (2 experts, 2 epochs)", "all", "test_nfnet"],
        ["random_5 (random)", "5", "test_vit"],
        ["herding_5 (herding)", "5", "test_vit"],
    ]
    assert [row[3] for row in rows] == ["0.01 0.1", "0.01 0.1", "", "0.01 0.1", "0.01 0.1"]
    assert table((tmp_path / "new/table.md").read_text()) == table(out)
    numbers = json.loads((tmp_path / "new/table.json").read_text())
    assert numbers["dataset"] == "tiny" and len(numbers["rows"]) == 5
    for row, stored in zip(rows, numbers["rows"], strict=True):
        assert row[-1] == f"{stored['mean']['r_mean']:.1f} ± {stored['std']['r_mean']:.1f}"
        assert stored["networks"] == 2


def test_all_data_is_the_last_snapshot_on_the_test_split(tiny_argv, tmp_path, sets, monkeypatch):
    argv = ["--num_experts", "2", "--train_epochs", "2", "--batch_size_train", "60", "--lr_teacher_img", "0.01"]
    recalls = []
    evaluate_retrieval = buffer.evaluate_retrieval
    find_split = data.find_split

    def note(*args):
        recalls.append(evaluate_retrieval(*args))
        return recalls[-1]

    # Let the experts be judged on the test split, so that buffer.py's own numbers are the expected ones.
    monkeypatch.setattr(data, "find_split", lambda a, split: find_split(a, {"val": "test"}.get(split, split)))
    monkeypatch.setattr(buffer, "evaluate_retrieval", note)
    assert buffer.main([*tiny_argv, *argv, "--buffer_path", str(tmp_path / "b"), "--disabled_wandb"]) == 0
    assert run_evaluate(sets, ["random"], "--all_data", tmp_path / "b", "--json", tmp_path / "t.json") == 0
    row = json.loads((tmp_path / "t.json").read_text())["rows"][1]
    last = [recalls[1], recalls[3]]
    for key in ("txt_r1", "img_r5", "r_mean"):
        assert row["mean"][key] == pytest.approx(sum(r[key] for r in last) / 2)
        assert row["std"][key] == pytest.approx(abs(last[0][key] - last[1][key]) / 2)


def test_every_row_is_tuned_over_as_many_candidates(sets, capsys, monkeypatch):
    asked = []
    score = evaluate.score

    def note(synset, retrieval, num_eval, seed, factory, args, looks):
        asked.append((synset.settings["method"], synset.syn_lr_img, synset.syn_lr_txt, num_eval, seed))
        return score(synset, retrieval, num_eval, seed, factory, args, looks)

    monkeypatch.setattr(evaluate, "score", note)
    assert run_evaluate(sets, ["random", "kcenter"], "--tune_rates", "--grid_img", 0.02, "--grid_txt", 0.2, 0.4) == 0
    tried = {method: [call[1:] for call in asked if call[0] == method] for method in ("random", "kcenter")}
    validated = {
        method: [rates for *rates, num_eval, seed in calls if (num_eval, seed) == (1, evaluate.VALIDATION_SEED)]
        for method, calls in tried.items()
    }
    assert validated["random"] == validated["kcenter"] and len(validated["random"]) >= 3
    assert len(set(map(tuple, validated["random"]))) == len(validated["random"])
    assert all(sum(seed == evaluate.TEST_SEED for *_, seed in calls) == 1 for calls in tried.values())


def test_sets_of_one_name_are_told_apart(sets, tmp_path, capsys):
    copy = tmp_path / "random_5.safetensors"
    copy.write_bytes((sets / "random_5.safetensors").read_bytes())
    assert evaluate.main(["--synset", str(copy), str(sets / copy.name), "--num_eval", "1"]) == 0
    names = [row[0] for row in table(capsys.readouterr().out)[1]]
    assert len(names) == 2 and names[0].startswith(f"{tmp_path.name}/") and names[1].startswith(f"{sets.name}/")


# ---- wrong input: exit code 2 and one line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--method", "random", "--num_queries", 25], ["--num_queries 25", "24"]),
        (["--method", "forgetting", "--train_epochs", 1], ["--train_epochs"]),
        (["--method", "forgetting", "--batch_size_train", 1], ["--batch_size_train"]),
        (["--method", "nearest"], ["nearest", "herding"]),
        (["--method", "herding", "--output", "set.pt"], ["set.pt", ".safetensors"]),
        (["--method", "forgetting", "--lr_teacher_img", "1e30"], ["lower the learning rates"]),
    ],
)
def test_options_that_cannot_work(run_coreset, tmp_path, capsys, argv, words):
    line = error_line(capsys, run_coreset, *argv, "--save_dir", tmp_path / "new")
    assert all(word in line for word in words) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["herding", "kcenter", "kmeans", "prototypes"])
def test_features_that_an_untrained_encoder_cannot_give(tiny_argv, tmp_path, capsys, method):
    at = tiny_argv.index("--image_checkpoint")
    argv = [*tiny_argv[:at], *tiny_argv[at + 2 :], "--no_image_pretrained", "--num_queries", "3"]
    argv += ["--method", method, "--save_dir", str(tmp_path)]
    assert "pretrained image encoder" in error_line(capsys, coreset.main, argv)
    assert coreset.main([*argv, "--features", "text"]) == 0


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--image_only", "--text_only"], "exclude"),
        (["--image_only", "--txt_init", "noise"], "noise"),
        (["--text_only", "--pix_init", "noise"], "noise"),
    ],
)
def test_ablations_that_cannot_work(tiny_argv, tmp_path, capsys, argv, word):
    assert word in error_line(capsys, distill.main, [*tiny_argv, *argv, "--save_dir", str(tmp_path / "run")])


def changed(sets, tmp_path, **settings):
    synset = load_synset(sets / "random_5.safetensors")
    synset.settings.update(settings)
    return synset, tmp_path / "changed.safetensors"


@pytest.mark.parametrize("key, value", [("dataset", "coco"), ("split_seed", 3)])
def test_sets_that_do_not_belong_in_one_table(sets, tmp_path, capsys, key, value):
    synset, path = changed(sets, tmp_path, **{key: value})
    save_synset(path, synset)
    line = error_line(capsys, evaluate.main, ["--synset", str(sets / "herding_5.safetensors"), str(path)])
    assert str(path) in line and f"{key}={value}" in line


def test_width_that_does_not_fit_the_text_encoder(sets, tmp_path, capsys):
    synset, path = changed(sets, tmp_path)
    synset.text_syn = synset.text_syn[:, :10]
    save_synset(path, synset)
    line = error_line(capsys, evaluate.main, ["--synset", str(path)])
    assert "width 10" in line and "demo" in line


def test_all_data_without_experts_and_too_few_checkpoints(sets, tmp_path, capsys):
    line = error_line(capsys, run_evaluate, sets, ["random"], "--all_data", tmp_path, "--num_eval", 1)
    assert "no expert" in line and str(tmp_path) in line
    encoders = ["--image_encoder", "test_nfnet", "test_vit", "--image_checkpoint", "one.safetensors"]
    assert "1 values for 2 image encoders" in error_line(capsys, run_evaluate, sets, ["random"], *encoders)


def test_table_that_cannot_be_written(sets, tmp_path, capsys):
    (tmp_path / "file").touch()
    for flag in ("--markdown", "--json"):
        line = error_line(capsys, run_evaluate, sets, ["random"], "--num_eval", 1, flag, tmp_path / "file/table")
        assert "cannot write" in line and str(tmp_path / "file/table") in line
