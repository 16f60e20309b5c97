"""The embedded data set: what it writes, that its captions tell its pictures apart, when it is made anew."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.demo.splits
from data.annotations import clean_caption, read_split
from data.demo import make_demo, scenes
from data.demo.scenes import demo_words
from data.errors import InputError
from data.pairs import find_images, read_image

VOCABULARY = Path(__file__).parent.parent / "networks/demo_bert/vocab.txt"
SMALL = {"num_train": 6, "num_val": 2, "num_test": 3, "image_size": 24}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder and records by split of a data set of 800 scenes."""
    root = tmp_path_factory.mktemp("demo") / "demo"
    make_demo(root, num_train=600, num_val=100, num_test=100, image_size=32)
    return root, {split: read_split("demo", split, root) for split in ("train", "val", "test")}


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_ordinary_reader_reads_it(demo):
    root, records = demo
    assert {split: len(rows) for split, rows in records.items()} == {"train": 600, "val": 100, "test": 100}
    for split, rows in records.items():
        assert all(len(record.captions) == 5 for record in rows)
        paths = find_images(rows, root)
        assert len(set(paths)) == len(rows) and paths[7].name == f"{split}_00007.png"
        assert read_image(paths[7]).size == (32, 32)


def test_pictures_and_captions_are_all_different(demo):
    root, records = demo
    rows = [record for split in records.values() for record in split]
    assert len({frozenset(record.captions) for record in rows}) == len(rows)
    assert len({read_image(path).tobytes() for path in find_images(rows, root)}) == len(rows)


def word_sense():
    """Word or phrase -> what it stands for, from the grammar's own tables."""
    tables = [scenes.SHAPES, scenes.COLOURS, scenes.SIZES, scenes.BACKGROUNDS, scenes.PATTERNS]
    return [(word, key) for table in tables for key, words in table.items() for word in words if word]


def test_synonyms_are_unambiguous():
    words = [word for word, _ in word_sense()]
    assert len(set(words)) == len(words)
    ways = [phrase for both_ways in scenes.RELATIONS.values() for way in both_ways for phrase in way]
    assert len(set(ways)) == len(ways)


def read_description(caption):
    """What a caption tells, in the grammar's keys: objects in order, relation, background. None: not all of it."""
    sense = dict(word_sense())
    keys = [sense[word] for word in caption.split() if word in sense]
    number = sum(key in scenes.SHAPES for key in keys)
    things = [tuple(keys[3 * i : 3 * i + 3]) for i in range(number)]
    about_background = keys[3 * number :]
    complete = all(len(t) == 3 and t[0] in scenes.SIZES and t[2] in scenes.SHAPES for t in things)
    if not complete or set(caption.split()) & set(scenes.VAGUE_SHAPES):
        return None
    if not about_background or about_background[0] not in scenes.BACKGROUNDS:
        return None
    for relation, both_ways in scenes.RELATIONS.items():
        for swapped, way in enumerate(both_ways):
            if any(f" {phrase} a" in caption for phrase in way):
                first_two = things[1::-1] if swapped else things[:2]
                return (*first_two, *things[2:], relation, *about_background)
    return None


def test_captions_tell_the_truth():
    rng = random.Random(0)
    for _ in range(300):
        scene = scenes.draw_scene(rng)
        things = [(thing.size, thing.colour, thing.shape) for thing in scene.things]
        truths = {(*things, scene.relation), (*things[:2], scene.relation)}
        truths = {(*t, scene.background, *p) for t in truths for p in [(), (scene.pattern,)]}
        told = [read_description(clean_caption(text)) for text in scenes.caption_scene(scene, rng)]
        assert any(told) and set(told) - {None} <= truths


def told_descriptions(records):
    """Each record's complete description: the longest that one of its captions tells."""
    told = []
    for record in records:
        descriptions = [d for d in map(read_description, record.captions) if d is not None]
        assert descriptions, record.captions
        told.append(max(descriptions, key=len))
    return told


def test_one_caption_tells_everything_and_no_scene_comes_twice(demo):
    told = {split: told_descriptions(records) for split, records in demo[1].items()}
    all_of_them = [description for split in told.values() for description in split]
    assert len(set(all_of_them)) == len(all_of_them) == 800
    assert not set(told["train"]) & {*told["val"], *told["test"]}


def test_scenes_are_never_repeated_even_when_few_are_possible(tmp_path, monkeypatch):
    drawn, few = [], iter([scenes.draw_scene(random.Random(i // 3)) for i in range(60)])

    def draw_from_few(rng):
        drawn.append(next(few))
        return drawn[-1]

    monkeypatch.setattr(data.demo.splits, "draw_scene", draw_from_few)
    make_demo(tmp_path / "demo", **SMALL)
    told = [told_descriptions(read_split("demo", s, tmp_path / "demo")) for s in ("train", "val", "test")]
    assert len({description for split in told for description in split}) == 11
    assert len(drawn) > 11


def test_the_picture_shows_what_the_scene_says():
    red, blue = list(scenes.COLOURS)[0], list(scenes.COLOURS)[2]
    things = (scenes.Thing("circle", red, "small"), scenes.Thing("square", blue, "large"))

    def centre_and_area(image, colour):
        near = np.abs(np.asarray(image).astype(int) - colour).max(-1) < 25
        return *np.argwhere(near).mean(0), near.sum()

    for relation in scenes.RELATIONS:
        scene = scenes.Scene(things, relation, (255, 255, 255), "plain")
        for seed in range(5):
            image = scenes.paint_scene(scene, 64, random.Random(seed))
            y, x, area = centre_and_area(image, red)
            other_y, other_x, other_area = centre_and_area(image, blue)
            assert other_area > 2 * area
            assert (relation == "left") == (x < other_x - 15) and (relation == "above") == (y < other_y - 15)
            assert image.getpixel((1, 1)) == (255, 255, 255)


def test_words_are_covered(demo):
    words = set(demo_words())
    said = {word for rows in demo[1].values() for r in rows for text in r.captions for word in text.split()}
    assert said <= words
    assert {"red", "disc", "surrounding", "an"} <= words and demo_words() == sorted(words)


def test_vocabulary_file_holds_every_word():
    tokens = VOCABULARY.read_text().splitlines()
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(tokens)) == len(tokens)
    assert set(demo_words()) <= set(tokens), "write data.demo.scenes.demo_words() into the vocabulary"
    assert {"a", "z", "##a", "##z"} <= set(tokens)


def test_captions_come_raw_and_vary(demo):
    root, records = demo
    raw = [row["caption"] for row in json.loads((root / "demo_train.json").read_text())]
    assert any(text.endswith(".") and text[0].isupper() for text in raw)
    assert [clean_caption(text) for text in raw[:5]] == list(records["train"][0].captions)
    assert max(len(clean_caption(text, max_words=99).split()) for text in raw) <= 30  # nothing is cut off
    assert sum(len(set(record.captions)) == 5 for record in records["train"]) > 590


def test_same_seed_same_files(tmp_path):
    make_demo(tmp_path / "one", **SMALL)
    make_demo(tmp_path / "two", **SMALL)
    make_demo(tmp_path / "other", **SMALL, seed=1)
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one == contents(tmp_path / "two")
    assert not any(one[name] == other[name] for name in one)


def test_test_split_does_not_depend_on_the_others(tmp_path):
    make_demo(tmp_path / "one", **SMALL)
    make_demo(tmp_path / "two", **{**SMALL, "num_train": 9, "num_val": 5})
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    names = [name for name in one if "test_" in name or name == "demo_test.json"]
    assert len(names) == 4 and all(one[name] == two[name] for name in names)


def test_complete_folder_is_left_alone(tmp_path, monkeypatch):
    root = tmp_path / "demo"
    make_demo(root, **SMALL)
    monkeypatch.setattr(data.demo.splits, "draw_scene", None)
    make_demo(root, **SMALL)


def test_incomplete_or_other_settings_is_made_anew(tmp_path):
    root = tmp_path / "demo"
    make_demo(root, **SMALL)
    whole = contents(root)
    (root / "demo-images/train_00003.png").unlink()
    make_demo(root, **SMALL)
    assert contents(root) == whole
    make_demo(root, **{**SMALL, "image_size": 40})
    assert Image.open(root / "demo-images/train_00003.png").size == (40, 40)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    calls = iter(range(100))
    paint = data.demo.splits.paint_scene

    def interrupted(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return paint(*args)

    monkeypatch.setattr(data.demo.splits, "paint_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path / "demo", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_files_are_not_touched(tmp_path):
    root = tmp_path / "mine"
    root.mkdir()
    make_demo(root, **SMALL)  # an empty folder is fine
    (root / "notes.txt").write_text("keep")
    make_demo(root, **SMALL)
    with pytest.raises(InputError, match=str(root)):
        make_demo(root, **SMALL, seed=1)
    assert (root / "notes.txt").read_text() == "keep" and len(read_split("demo", "test", root)) == 3
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match="file"):
        make_demo(tmp_path / "file", **SMALL)
    with pytest.raises(InputError, match="cannot write"):
        make_demo(tmp_path / "file" / "below", **SMALL)
