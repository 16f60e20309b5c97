"""A folder of pictures with their captions, and nothing else: what `--dataset NAME --image_root FOLDER` makes of it."""

import csv
import json
import random

import pytest

import buffer
import coreset
import distill
import evaluate
from data.annotations import read_split
from data.demo.scenes import caption_scene, draw_scene, paint_scene
from tests.conftest import ENCODER_WEIGHTS, QUICK_BUFFER, QUICK_DISTILL
from tests.programs import error_line, input_error
from utils.sets import load_synset

SPLITS = ("train", "val", "test")


def draw(root, pictures=20):
    """Writes pictures in two folders; gives two captions of each by its name."""
    rng, captions = random.Random(0), {}
    for number in range(pictures):
        scene, name = draw_scene(rng), f"{'cats' if number % 2 else 'dogs'}/{number:02d}.PNG"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        paint_scene(scene, 32, rng).save(root / name)
        captions[name] = tuple(text.lower().rstrip(".") for text in caption_scene(scene, rng)[:2])
    return captions


def rows(captions):
    return [(name, caption) for name, of_picture in captions.items() for caption in of_picture]


def write_csv(root, captions, name="words.csv", header=("file_name", "caption")):
    with (root / name).open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows(captions)])


def write_csv_of_its_name(root, captions):
    write_csv(root, captions, "mine.csv", ("image", "caption"))


def write_lines(root, captions):
    (root / "all.jsonl").write_text("".join(f"{json.dumps({'image': i, 'caption': c})}\n" for i, c in rows(captions)))


def write_metadata(root, captions):
    (root / "metadata.jsonl").write_text(
        "".join(f"{json.dumps({'file_name': i, 'text': c})}\n" for i, c in rows(captions))
    )


def write_texts(root, captions):
    for name, of_picture in captions.items():
        (root / name).with_suffix(".txt").write_text("\n\n".join([*of_picture, ""]))
    (root / "README.txt").write_text("no caption: no picture is called README")


@pytest.fixture
def flags(tmp_path):
    """Of all scripts: the folder alone says where pictures and captions are; the encoders need no download."""
    return [
        *("--dataset", "mine", "--image_root", str(tmp_path / "pictures"), "--image_size", "32"),
        *("--image_encoder", "test_nfnet", "--image_checkpoint", str(ENCODER_WEIGHTS), "--text_encoder", "demo"),
        *("--text_pooling", "mean", "--num_workers", "0", "--device", "cpu", "--cache_dir", str(tmp_path / "cache")),
    ]


@pytest.mark.parametrize("write", [write_csv, write_csv_of_its_name, write_lines, write_metadata, write_texts])
def test_every_form_gives_the_same_splits(tmp_path, capsys, write):
    captions = draw(tmp_path)
    write(tmp_path, captions)
    found = {split: read_split("mine", split, tmp_path, split_seed=3) for split in SPLITS}
    (line,) = capsys.readouterr().out.splitlines()
    assert "20 pictures" in line and "--split_seed 3: 16 train, 2 val, 2 test" in line
    assert {record.image: record.captions for records in found.values() for record in records} == captions
    drawn = sorted(captions)
    random.Random("split 3").shuffle(drawn)
    assert [{record.image for record in found[split]} for split in ("val", "test")] == [set(drawn[:2]), set(drawn[2:4])]


def test_four_scripts_work_on_a_folder_of_ten_pictures(tmp_path, flags, capsys):
    root, out = tmp_path / "pictures", tmp_path / "out"
    captions = draw(root, pictures=10)
    write_texts(root, captions)
    buffers = ["--buffer_path", str(out / "buffers")]
    assert buffer.main([*flags, *QUICK_BUFFER, *buffers, "--num_experts", "1"]) == 0
    told = "pictures names no splits; its 10 pictures are split by --split_seed 0: 8 train, 1 val, 1 test"
    assert capsys.readouterr().out.count(told) == 1
    run = ["--save_dir", str(out / "run"), "--Iteration", "1", "--no_report"]
    assert distill.main([*flags, *QUICK_DISTILL, *buffers, *run, "--max_start_epoch", "1"]) == 0
    chosen = str(out / "chosen.safetensors")
    assert coreset.main([*flags, "--method", "random", "--num_queries", "3", "--output", chosen, "--no_draw"]) == 0
    best = str(out / "run/best.safetensors")
    argv = ["--synset", best, chosen, "--num_eval", "1", "--json", str(out / "table.json")]
    assert evaluate.main(argv) == 0  # which takes data and encoders from the set
    assert len(json.loads((out / "table.json").read_text())["rows"]) == 2
    drawn = sorted(captions)
    random.Random("split 0").shuffle(drawn)
    assert set(load_synset(chosen).files) < set(drawn[2:])
    # The defaults are for more pictures than these.
    for call in (
        lambda: coreset.main([*flags, "--method", "random"]),
        lambda: distill.main([*flags, *QUICK_DISTILL, *buffers, *run[2:], "--num_queries", "100"]),
    ):
        assert "--num_queries 100 is more than the 8 training pictures; lower it" in error_line(capsys, call)


def test_a_given_folder_of_annotations_counts(tmp_path):
    for parse_args, needed in ((buffer.parse_args, []), (coreset.parse_args, ["--method", "random"])):
        assert parse_args([*needed, "--dataset", "mine", "--image_root", "I"]).ann_root == "I"
        assert parse_args([*needed, "--dataset", "mine", "--image_root", "I", "--ann_root", "A"]).ann_root == "A"
        assert parse_args([*needed, "--dataset", "coco", "--image_root", "I"]).ann_root == "./Flickr30k/ann_file/"
        assert parse_args([*needed, "--dataset", "demo"]).ann_root == "demo_data"


def test_pictures_without_a_caption_are_told_of(tmp_path, capsys):
    captions = draw(tmp_path)
    write_texts(tmp_path, captions)
    (tmp_path / "dogs/00.txt").write_text("\n \n")
    (tmp_path / "cats/01.txt").unlink()
    images = {record.image for split in SPLITS for record in read_split("mine", split, tmp_path)}
    assert images == set(captions) - {"dogs/00.PNG", "cats/01.PNG"}
    warning, told = capsys.readouterr().out.splitlines()
    assert f"left out 2 of 20 pictures without a caption, the first is {tmp_path / 'cats/01.PNG'}" in warning
    assert "18 pictures" in told


def test_what_cannot_be_told_apart_or_found_is_a_line(tmp_path):
    captions = draw(tmp_path)
    assert "a text file beside each picture" in input_error(read_split, "mine", "train", tmp_path)
    write_csv(tmp_path, captions)
    write_lines(tmp_path, captions)
    assert "all.jsonl, words.csv; give one" in input_error(read_split, "mine", "train", tmp_path)
    assert "words.csv" not in input_error(read_split, "flickr8k", "train", tmp_path)
