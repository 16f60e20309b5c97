"""Annotation files as they are published, on invented rows: told apart by their contents, and split."""

import json

import numpy as np
import pytest
from PIL import Image

import buffer
import coreset
import distill
import evaluate
from data.annotations import Record, read_split
from data.pairs import find_images, shared_pictures
from tests.programs import error_line, input_error
from tests.test_data import write_json
from utils.sets import load_synset, save_synset

NAMES = [f"{i:02d}.jpg" for i in range(30)]
METHOD = ["--method", "random"]
SPLITS = ("train", "val", "test")


def texts(i):
    return [f"Dog {i} runs .", f"A second view, of dog {i} ."]


def cleaned(i):
    return tuple(f"{text}" for text in (f"dog {i} runs", f"a second view, of dog {i}"))


def pipes(root):
    rows = [f"{name}| {k}| {text}" for i, name in enumerate(NAMES) for k, text in enumerate(texts(i))]
    rows[3] = rows[3].replace(f"| 1| {texts(1)[1]}", f"| 1   {texts(1)[1]}")  # as in one row of the published file
    assert rows[3].count("|") == 1
    (root / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows, ""]))


def tokens(root, file_name="results_20130124.token"):
    rows = [f"{name}#{k}\t{text}\n" for i, name in enumerate(NAMES) for k, text in enumerate(texts(i))]
    (root / file_name).write_text("".join([*rows, "99.jpg.1#0\tNo such picture .\n"]))


def flickr8k_tokens(root):
    tokens(root, "Flickr8k.token.txt")


def coco(root):
    images = [{"id": 7 * i, "file_name": name, "license": 3} for i, name in enumerate(NAMES)]
    rows = [{"image_id": 7 * i, "id": k, "caption": texts(i)[k]} for k in (0, 1) for i in range(len(NAMES))]
    write_json(root / "captions_train2014.json", {"info": {}, "images": images, "annotations": rows})


def json_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def metadata_rows(root):
    json_lines(root / "metadata.jsonl", [{"file_name": n, "text": t} for i, n in enumerate(NAMES) for t in texts(i)])


def metadata_lists(root):
    json_lines(root / "metadata.jsonl", [{"file_name": n, "caption": texts(i)} for i, n in enumerate(NAMES)])


def lines_in_json(root):
    json_lines(root / "mine.json", [{"image": n, "caption": texts(i)} for i, n in enumerate(NAMES)])


def list_in_json(root):
    write_json(root / "mine.json", [{"image": n, "caption": texts(i)} for i, n in enumerate(NAMES)])


def table(name, separator, header):
    def write(root):
        rows = [f'{n}{separator}"{text}"' for i, n in enumerate(NAMES) for text in texts(i)]
        (root / name).write_text("\r\n".join([header, *rows, ""]))

    return write


def unquoted_table(root):
    rows = [f"{n},{text}" for i, n in enumerate(NAMES) for text in texts(i)]
    (root / "captions.txt").write_text("\n".join(["image,caption", *rows]))


FORMS = {
    **{"pipes": pipes, "token": tokens, "flickr8k": flickr8k_tokens, "coco": coco, "lines": lines_in_json},
    **{"metadata": metadata_rows, "metadata lists": metadata_lists, "list": list_in_json, "commas": unquoted_table},
    "tsv": table("mine.tsv", "\t", "filepath\ttitle"),
    "open_clip csv": table("mine.csv", ",", "filepath,title"),
    "semicolons": table("mine.csv", ";", "filepath;title"),
    "spaces": table("mine.csv", " ", "filepath title"),
    "captions.txt": table("captions.txt", ",", "image,caption"),
}


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
def test_form_is_read_and_split_by_picture(tmp_path, capsys, write):
    write(tmp_path)
    found = {split: read_split("mine", split, tmp_path) for split in SPLITS}
    assert {split: len(records) for split, records in found.items()} == {"train": 24, "val": 3, "test": 3}
    every = sorted((record for records in found.values() for record in records), key=lambda record: record.image)
    assert [(record.image, record.captions) for record in every] == [(n, cleaned(i)) for i, n in enumerate(NAMES)]
    (line,) = capsys.readouterr().out.splitlines()
    for part in ("30 pictures", "24 train, 3 val, 3 test", "--split_seed 0"):
        assert part in line


def test_image_id_of_coco(tmp_path):
    coco(tmp_path)
    ids = {record.image: record.image_id for record in read_split("coco", "train", tmp_path)}
    assert all(image_id == str(7 * NAMES.index(image)) for image, image_id in ids.items())


def test_split_depends_on_the_seed_and_not_on_form_or_order(tmp_path):
    tested = []
    for number, write in enumerate((pipes, coco, list_in_json)):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number))
        tested.append({record.image for record in read_split("mine", "test", tmp_path / str(number))})
    assert tested[0] == tested[1] == tested[2]
    other = {record.image for record in read_split("mine", "test", tmp_path / "0", 1)}
    assert other != tested[0] and len(other) == 3


def test_held_out_pictures_are_at_most_a_thousand(tmp_path, capsys):
    json_lines(tmp_path / "metadata.jsonl", [{"file_name": f"{i}.jpg", "text": "a"} for i in range(12000)])
    assert [len(read_split("mine", split, tmp_path)) for split in SPLITS] == [10000, 1000, 1000]
    assert "10,000 train, 1,000 val, 1,000 test" in capsys.readouterr().out


def test_too_few_pictures_for_three_splits(tmp_path):
    json_lines(tmp_path / "metadata.jsonl", [{"file_name": f"{i}.jpg", "text": "a"} for i in range(2)])
    assert "2 pictures" in input_error(read_split, "mine", "test", tmp_path)


def test_lists_beside_the_file_say_the_splits(tmp_path, capsys):
    flickr8k_tokens(tmp_path)
    parts = {"train": NAMES[5:20], "dev": NAMES[:2], "test": NAMES[2:5]}
    for name, names in parts.items():
        (tmp_path / f"Flickr_8k.{name}Images.txt").write_text("\n".join(names))
    for split, name in zip(SPLITS, parts, strict=True):
        assert [record.image for record in read_split("flickr8k", split, tmp_path)] == parts[name]
    (line,) = capsys.readouterr().out.splitlines()
    assert "Flickr_8k.devImages.txt" in line and "15 train, 2 val, 3 test, 10 in none" in line
    (tmp_path / "Flickr_8k.devImages.txt").unlink()
    assert "Flickr_8k.devImages.txt" in input_error(read_split, "flickr8k", "val", tmp_path / "Flickr8k.token.txt", 5)


def test_lists_may_leave_endings_out_and_must_not_overlap(tmp_path):
    tokens(tmp_path)
    for split, names in zip(SPLITS, (NAMES[4:], NAMES[:2], NAMES[2:4]), strict=True):
        (tmp_path / f"{split}.txt").write_text("\n".join(name.removesuffix(".jpg") for name in names))
    assert [record.image for record in read_split("flickr", "val", tmp_path)] == NAMES[:2]
    (tmp_path / "test.txt").write_text("00\n02")
    line = input_error(read_split, "flickr", "val", tmp_path, 1)
    assert "test.txt" in line and "00" in line
    (tmp_path / "test.txt").write_text("other")
    assert "names no picture" in input_error(read_split, "flickr", "val", tmp_path, 1)


def test_splits_that_a_file_names(tmp_path, capsys):
    rows = [{"file_name": f"{s}.jpg", "text": s, "split": s} for s in ("train", "restval", "validation", "dev", "test")]
    json_lines(tmp_path / "metadata.jsonl", rows)
    found = [[record.image_id for record in read_split("mine", split, tmp_path)] for split in SPLITS]
    assert found == [["train", "restval"], ["validation", "dev"], ["test"]] and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine_val.jsonl", '{"image": "a/b.jpg", "caption": "A dog."}\n{"image": "a/b.jpg", "caption": "Two dogs."}'),
        (
            "mine_val.json",
            '{"image": "a/b.jpg", "caption": "A dog."}\n\n{"image": "a/b.jpg", "caption": "Two dogs."}\n',
        ),
        ("mine_val.json", '[{"file_name": "a/b.jpg", "text": ["A dog.", "Two dogs."]}]'),
        ("mine_val.tsv", "filepath\ttitle\na/b.jpg\tA dog.\na/b.jpg\tTwo dogs."),
        ("mine_val.csv", "title,filepath\nA dog.,a/b.jpg\nTwo dogs.,a/b.jpg"),
        ("mine_val.csv", "image,caption\na\\b.jpg,A dog.\na\\b.jpg,Two dogs."),
        ("mine_val.json", '[{"image": "a\\\\b.jpg", "caption": ["A dog.", "Two dogs."]}]'),
    ],
)
def test_file_of_one_split(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_split("mine", "val", tmp_path) == [Record("a/b.jpg", ("a dog", "two dogs"), "b")]
    pipes(tmp_path)  # the data set has files of its own: another one is not mixed in
    assert "mine_test.json" in input_error(read_split, "mine", "test", tmp_path)


def test_folders_of_the_splits(tmp_path):
    for folder in ("train", "validation"):
        (tmp_path / folder).mkdir()
        json_lines(tmp_path / folder / "metadata.jsonl", [{"file_name": "b.jpg", "text": f"A {folder} dog."}])
    assert read_split("mine", "train", tmp_path) == [Record("train/b.jpg", ("a train dog",), "b")]
    assert read_split("mine", "val", tmp_path) == [Record("validation/b.jpg", ("a validation dog",), "b")]
    assert "no annotations" in input_error(read_split, "mine", "test", tmp_path)


def test_unusual_line_ends_are_part_of_a_caption(tmp_path):
    (tmp_path / "mine_val.tsv").write_text("filepath\ttitle\na.jpg\tA dog\u2028runs\x0b.\n", encoding="utf-8")
    (tmp_path / "results_20130124.token").write_text("a.jpg#0\tA dog\u2028runs\x0b.\n" * 3, encoding="utf-8")
    assert read_split("mine", "val", tmp_path)[0].captions == ("a dog runs",)
    assert "1 pictures" in input_error(read_split, "mine", "val", tmp_path / "results_20130124.token")


def test_windows_separators_lead_to_the_pictures(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a/b.jpg")
    (tmp_path / "mine_val.json").write_text('[{"image": "a\\\\b.jpg", "caption": "A dog."}]')
    assert find_images(read_split("mine", "val", tmp_path), tmp_path) == [tmp_path / "a/b.jpg"]


def test_several_files_are_asked_about_and_one_can_be_named(tmp_path):
    coco(tmp_path)
    metadata_rows(tmp_path)
    line = input_error(read_split, "mine", "val", tmp_path)
    assert "captions_train2014.json, metadata.jsonl" in line and "--ann_root" in line
    assert len(read_split("mine", "val", tmp_path / "metadata.jsonl")) == 3


def test_csv_without_splits_can_be_named_too(tmp_path):
    table("mine.csv", ",", "image,caption")(tmp_path)
    assert read_split("mine", "val", tmp_path) == read_split("mine", "val", tmp_path / "mine.csv")


def test_a_known_data_set_does_not_take_anothers_file(tmp_path):
    pipes(tmp_path)
    coco(tmp_path)
    assert read_split("flickr", "val", tmp_path)[0].image_id in {name.removesuffix(".jpg") for name in NAMES}
    assert read_split("coco", "val", tmp_path)[0].image_id not in {name.removesuffix(".jpg") for name in NAMES}
    assert "no annotations" in input_error(read_split, "flickr8k", "val", tmp_path)


BOTH = {"images": [{"id": 1, "file_name": "a", "sentences": []}], "annotations": []}
BROKEN = {
    "two columns": ("metadata.jsonl", '{"file_name": "a", "text": "b", "caption": "c"}', ["fits two forms", "text"]),
    "two headers": ("mine.tsv", "image\tcaption\tfilepath\ttitle\na\tb\tc\td", ["fits two forms", "title"]),
    "two of images": ("mine.json", json.dumps(BOTH), ["fits two forms", "COCO"]),
    "no captions": ("mine.json", '{"images": []}', ["without captions"]),
    "unknown columns": ("captions.txt", "name,words\na,b", ["first line", "image and caption"]),
    "empty": ("captions.txt", "", ["first line"]),
    "no pictures": ("captions.txt", "image,caption\n", ["0 pictures"]),
    "few columns": ("mine.tsv", "filepath\ttitle\na\tb\nc", ["row 2", "1 columns"]),
    "no tab": ("results_20130124.token", "a.jpg#0\tA dog\nb.jpg#0 A cat", ["line 2", "tab"]),
    "broken line": ("metadata.jsonl", '{"file_name": "a", "text": "b"}\n{"file_name"', ["line 2", "column"]),
    "list without": ("mine.json", '[{"file_name": "a"}]', ["row 1", "file_name and text"]),
    "lost picture": ("captions_val2014.json", '{"images": [], "annotations": [{"image_id": 5}]}', ["id 5", "1"]),
    "no id": ("captions_val2014.json", '{"images": [{}], "annotations": []}', ["row 1", "'id'"]),
    "id is a list": (
        "captions_val2014.json",
        '{"images": [{"id": [1], "file_name": "a"}], "annotations": []}',
        ["'id'"],
    ),
    "split is a list": ("metadata.jsonl", '{"file_name": "a", "text": "b", "split": ["train"]}', ["no rows"]),
    "not a text": ("metadata.jsonl", '{"file_name": 3, "text": "b"}\n' * 2, ["pictures"]),
    "not UTF-8": ("captions.txt", b"image,caption\na,\xff", ["UTF-8"]),
}


@pytest.mark.parametrize(("name", "content", "parts"), BROKEN.values(), ids=BROKEN)
def test_broken_form_is_told_in_a_line(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = input_error(read_split, "mine", "train", tmp_path)
    assert all(part in line for part in [str(tmp_path / name), *parts]), line


def test_all_scripts_take_the_seed_of_the_split(straight, tmp_path):
    for parse_args, needed in ((buffer.parse_args, []), (distill.parse_args, []), (coreset.parse_args, METHOD)):
        assert parse_args(needed).split_seed == 0
        assert parse_args([*needed, "--split_seed", "3"]).split_seed == 3
    synset = load_synset(straight / "best.safetensors")
    synset.settings["split_seed"] = 5
    save_synset(tmp_path / "set.safetensors", synset)
    argv = ["--synset", str(tmp_path / "set.safetensors")]
    assert evaluate.parse_args(argv).split_seed == 5  # else pictures that the set was made of may be in the test split
    assert evaluate.parse_args([*argv, "--split_seed", "3"]).split_seed == 3


def test_experts_of_another_split_are_refused(experts, run_buffer, capsys):
    assert "split_seed=0" in error_line(capsys, run_buffer, experts, "--num_experts", 2, "--split_seed", 1)


# ---- pictures in two splits


def test_pictures_of_the_same_bytes_or_file_are_found(tmp_path):
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path, compress_level=0)
    assert len({path.stat().st_size for path in paths}) == 1
    assert shared_pictures(paths[:3], paths[3:]) == []
    paths[4].write_bytes(paths[1].read_bytes())
    assert shared_pictures(paths[:3], [*paths[3:], paths[0]]) == [(paths[1], paths[4]), (paths[0], paths[0])]


def test_scripts_tell_of_pictures_in_two_splits(tiny_data, tmp_path, run_buffer, run_distill, capsys):
    root = tmp_path / "data"
    root.mkdir()
    for path in tiny_data.iterdir():
        if path.name != "tiny_val.json":
            (root / path.name).symlink_to(path)
    train, val = (json.loads((tiny_data / f"tiny_{split}.json").read_text()) for split in ("train", "val"))
    images = sorted({row["image"] for row in train})
    for row, image in zip(val, images[:3], strict=False):
        row["image"] = image
    write_json(root / "tiny_val.json", val)
    argv = ["--ann_root", root, "--image_root", root]
    assert run_buffer(tmp_path / "b", "--num_experts", 1, "--train_epochs", 1, *argv) == 0
    told = f"have 3 in common, by file or by bytes: {root / images[0]}, {root / images[1]}\n"
    assert told in capsys.readouterr().out
    assert run_distill(tmp_path / "r", "--Iteration", 0, *argv) == 0
    assert told in capsys.readouterr().out
