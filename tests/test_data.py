"""Annotations, pictures, transforms, the loader and the text cache, on files made here."""

import csv
import io
import json
import random
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from data.annotations import Record, clean_caption, read_split
from data.caches import pictures as image_cache
from data.caches.captions import embed_captions
from data.pairs import PairDataset, drop_unreadable, find_images, pair_loader, read_image, retrieval_set
from data.transforms import denormalize, eval_transform, normalize, train_transform
from tests.programs import input_error
from utils.scoring import features

PICTURES = {"pics/a.png": ["A dog.", "Two dogs!"], "pics/b.png": [f"Cat number {i}." for i in range(6)]}
EXPECTED = [
    Record("pics/a.png", ("a dog", "two dogs"), "a"),
    Record("pics/b.png", tuple(f"cat number {i}" for i in range(6)), "b"),
]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def caption_rows():
    return [(image, caption) for image, captions in PICTURES.items() for caption in captions]


# ---- annotations


def test_caption_is_cleaned():
    assert clean_caption('  A "Big" dog: runs!\n(fast); #1 ~ *wow*. ') == "a big dog runs fast 1 wow"
    assert clean_caption("well-known dog's bone, eh?") == "well-known dog's bone, eh?"
    assert clean_caption(" ".join(map(str, range(50)))) == " ".join(map(str, range(30)))
    assert clean_caption("a.b") == "a b"


def write_albef_train(root):
    rows = [{"image": image, "caption": text, "image_id": image[5:6]} for image, text in caption_rows()]
    write_json(root / "mine_train.json", rows)


def write_albef_test_form(root):
    write_json(root / "mine_train.json", [{"image": k, "caption": v} for k, v in PICTURES.items()])


def write_karpathy(root):
    splits = {"pics/a.png": "train", "pics/b.png": "restval"}
    images = [
        {"filepath": "pics", "filename": k[5:], "split": splits[k], "sentences": [{"raw": text} for text in v]}
        for k, v in PICTURES.items()
    ]
    other = {"filename": "c.png", "split": "test", "sentences": [{"raw": "not this"}]}
    write_json(root / "dataset_mine.json", {"images": [other, *images]})


def write_split_csv(root):
    write_csv(root / "mine_train.csv", ["image", "caption"], caption_rows())


def write_single_csv(root):
    rows = [(text, image, "train") for image, text in caption_rows()]
    write_csv(root / "mine.csv", ["caption", "image", "split"], [("other", "pics/c.png", "test"), *rows])


@pytest.mark.parametrize(
    "write", [write_albef_train, write_albef_test_form, write_karpathy, write_split_csv, write_single_csv]
)
def test_all_forms_read_the_same(tmp_path, write):
    write(tmp_path)
    assert read_split("mine", "train", tmp_path) == EXPECTED


def test_rows_of_a_picture_are_grouped_where_it_is_first_seen(tmp_path):
    rows = [{"image": name, "caption": text, "image_id": 7} for name, text in ("b1", "a2", "b3")]
    write_json(tmp_path / "mine_val.json", rows)
    assert read_split("mine", "val", tmp_path) == [Record("b", ("1", "3"), "7"), Record("a", ("2",), "7")]


def test_file_names_of_the_known_datasets(tmp_path):
    write_json(tmp_path / "flickr30k_test.json", [{"image": "x.jpg", "caption": ["X"]}])
    write_json(tmp_path / "coco_karpathy_test.json", [{"image": "y.jpg", "caption": ["Y"]}])
    karpathy = {"filename": "z.jpg", "split": "val", "sentences": [{"raw": "Z"}]}
    write_json(tmp_path / "dataset_coco.json", {"images": [karpathy]})
    assert read_split("flickr", "test", tmp_path)[0].image == "x.jpg"
    assert read_split("coco", "test", tmp_path)[0].image == "y.jpg"
    assert read_split("coco", "val", tmp_path)[0].image == "z.jpg"


def test_annotations_not_found(tmp_path):
    line = input_error(read_split, "mine", "val", tmp_path)
    for part in (str(tmp_path), "mine_val.json", "dataset_mine.json", "mine_val.csv", "mine.csv"):
        assert part in line
    assert str(tmp_path / "nowhere") in input_error(read_split, "mine", "val", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('[{"image": "a.png",\n  "caption" "x"}]', ["line 2", "column 13"]),
        ('[{"image": "a.png", "caption": "x"}, {"image": "b.png"}]', ["row 2", "'caption'"]),
        ('[{"caption": "x"}]', ["row 1", "'image'"]),
        ('[{"image": "a.png", "caption": []}]', ["row 1", "caption"]),
        ('[{"image": "a.png", "caption": ["x", 3]}]', ["row 1", "caption"]),
        ('[{"image": 5, "caption": "x"}]', ["row 1", "'image'"]),
        ('["a.png"]', ["row 1"]),
        ('{"image": "a.png"}', ["list"]),
        ("[]", ["no rows"]),
        ("", ["line 1"]),
    ],
)
def test_broken_json_is_told_with_its_place(tmp_path, content, parts):
    path = tmp_path / "mine_val.json"
    path.write_text(content)
    line = input_error(read_split, "mine", "val", tmp_path)
    assert all(part in line for part in [str(path), *parts]), line


def test_broken_karpathy_and_csv(tmp_path):
    write_csv(tmp_path / "mine.csv", ["image", "caption", "split"], [("a.png", "A dog", "train")])
    assert "no rows" in input_error(read_split, "mine", "val", tmp_path)
    image = {"filename": "a.png", "split": "val", "sentences": [{"tokens": []}]}
    write_json(tmp_path / "dataset_mine.json", {"images": [image]})
    assert "row 1: no 'raw'" in input_error(read_split, "mine", "val", tmp_path)


def test_annotations_are_downloaded_and_kept(tmp_path, monkeypatch):
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(json.dumps([{"image": "a.jpg", "caption": ["A dog."]}]).encode())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    for _ in range(2):
        assert read_split("flickr", "val", tmp_path / "new")[0].captions == ("a dog",)
    address = "https://storage.googleapis.com/sfr-vision-language-research/datasets/flickr30k_val.json"
    assert asked == [address]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["flickr30k_val.json"]


@pytest.mark.parametrize("page", [None, b"<html>please log in</html>"])
def test_failed_download_leaves_nothing(tmp_path, monkeypatch, page):
    def answer(url, timeout):
        if page is None:
            raise urllib.error.URLError("no network")
        return io.BytesIO(page)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    line = input_error(read_split, "coco", "train", tmp_path / "new")
    assert "datasets/coco_karpathy_train.json" in line and str(tmp_path / "new") in line
    assert list(tmp_path.iterdir()) == []


# ---- pictures


@pytest.fixture
def pictures(tmp_path):
    """Two records and their pictures, of different sizes and colours, under tmp_path/pics."""
    (tmp_path / "pics").mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (30, 40, 3)), ("b.png", (50, 20, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / "pics" / name)
    return EXPECTED, [tmp_path / "pics/a.png", tmp_path / "pics/b.png"]


def test_image_root_with_and_without_the_folder(tmp_path, pictures):
    records, paths = pictures
    assert find_images(records, tmp_path) == paths
    assert find_images(records, tmp_path / "pics") == paths
    paths[0].unlink()
    assert find_images(records[1:], str(tmp_path / "pics")) == paths[1:]


def test_missing_pictures_are_counted(tmp_path, pictures):
    records, paths = pictures
    paths[0].unlink()
    line = input_error(find_images, records, tmp_path)
    assert "1 of 2" in line and str(paths[0]) in line and "--image_root" in line
    assert str(tmp_path / "none") in input_error(find_images, records, tmp_path / "none")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    grey = Image.fromarray(np.array([[0, 100], [200, 250]], dtype=np.uint8))
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256) if mode == "I;16" else grey.convert(mode)
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(path)
    decoded = read_image(path)
    assert decoded.mode == "RGB"
    expected = np.asarray(image.convert("L") if mode == "1" else grey)
    assert np.array_equal(np.asarray(decoded), np.stack([expected] * 3, -1))


def test_transparent_parts_become_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_pictures_are_turned_as_their_exif_data_say(tmp_path, ending):
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:8, :12] = 255  # white at the upper left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", exif=exif)
    decoded = read_image(tmp_path / f"a.{ending}")
    assert decoded.size == (16, 24)
    assert decoded.getpixel((14, 2))[0] > 200 and decoded.getpixel((2, 2))[0] < 50


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_do_not_matter(tmp_path):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00nonsense")
    assert read_image(tmp_path / "a.jpg").size == (6, 4)


def test_keys_of_caches_name_how_pictures_are_read(tmp_path, pictures, monkeypatch):
    encoder = torch.nn.Linear(2, 2)
    encoder.mean, encoder.std = MEAN, STD
    for module, more in ((image_cache, (16,)), (features, (encoder,))):
        arguments = (pictures[1], *more) if module is image_cache else ("16", pictures[1], *more)
        key = module._cache_key(*arguments)
        monkeypatch.setattr(module, "READING", "of another version")
        assert module._cache_key(*arguments) != key


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_unreadable_pictures(tmp_path, pictures):
    records, paths = pictures
    cut_short(paths[1])
    line = input_error(read_image, paths[1])
    assert str(paths[1]) in line and "--skip_broken" in line
    (tmp_path / "text.jpg").write_text("not a picture")
    assert "text.jpg" in input_error(read_image, tmp_path / "text.jpg")
    assert drop_unreadable(records, paths) == (records[:1], paths[:1], paths[1:])


def test_retrieval_set(pictures):
    records, paths = pictures
    gallery = retrieval_set(records, paths, 16)
    assert gallery.images.shape == (2, 3, 16, 16) and gallery.images.dtype == torch.uint8
    assert torch.equal(gallery.images[1], eval_transform(16)(read_image(paths[1])))
    assert gallery.captions == ["a dog", "two dogs", *EXPECTED[1].captions]
    assert gallery.caption_to_image.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    cut_short(paths[1])
    assert "b.png" in input_error(lambda: retrieval_set(records, paths, 16).images)


def test_some_pictures_of_a_retrieval_set_are_read_alone(pictures):
    records, paths = pictures
    whole = retrieval_set(records, paths, 16)
    cut_short(paths[0])
    (picture,) = whole.some_images([1])
    assert torch.equal(picture, eval_transform(16)(read_image(paths[1])))


# ---- transforms


def test_eval_transform_keeps_the_whole_picture():
    halves = np.zeros((20, 60, 3), dtype=np.uint8)
    halves[:, 30:] = 255
    image = eval_transform(32)(Image.fromarray(halves))
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert image[:, :, :12].max() == 0 and image[:, :, -12:].min() == 255


def test_train_transform_varies_with_the_seed_alone(pictures):
    image = read_image(pictures[1][0])
    transform = train_transform(24)

    def draw(seed):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return transform(image)

    assert draw(0).shape == (3, 24, 24) and draw(0).dtype == torch.uint8
    assert torch.equal(draw(3), draw(3))
    assert len({draw(seed).numpy().tobytes() for seed in range(8)}) == 8
    assert torch.equal(train_transform(24, no_aug=True)(image), eval_transform(24)(image))


def test_train_crops_at_least_half_of_the_picture():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))  # the value is the column
    image = Image.fromarray(np.stack([ramp] * 3, -1))
    crop = train_transform(64).transforms[0]
    spans = [np.ptp(np.asarray(crop(image))[0, :, 0].astype(int)) + 1 for _ in range(50)]
    # Bicubic sampling stays a few columns inside the crop; half the area at 3:4 is 0.61 of the width.
    assert min(spans) > 0.6 * 256 - 8 and max(spans) > min(spans)


def test_normalize_and_its_inverse():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    normalized = normalize(images, MEAN, STD)
    assert normalized.dtype == torch.float32
    assert normalized[1, 2, 3, 1].item() == pytest.approx(
        (images[1, 2, 3, 1].item() / 255 - MEAN[2]) / STD[2], abs=1e-5
    )
    torch.testing.assert_close(denormalize(normalized, MEAN, STD), images / 255, atol=1e-6, rtol=0)
    torch.testing.assert_close(normalize(images[0], MEAN, STD), normalized[0])
    far = denormalize(torch.tensor([-99.0, 99.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1), MEAN, STD)
    assert far[0].max() == 0 and far[1].min() == 1


# ---- the loader


def epochs(dataset, seed, num_workers, count=2):
    loader = pair_loader(dataset, 3, seed, num_workers)
    return [[(images.clone(), rows.clone()) for images, rows in loader] for _ in range(count)]


def same(left, right):
    batches = [list(zip(a, b, strict=True)) for a, b in zip(left, right, strict=True)]
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for epoch in batches for x, y in epoch)


def test_pair_dataset_has_a_row_per_caption(pictures):
    records, paths = pictures
    dataset = PairDataset(records, paths, eval_transform(16))
    assert len(dataset) == 8 and dataset.captions[:3] == ["a dog", "two dogs", "cat number 0"]
    assert dataset.row_to_image.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    image, row = dataset[2]
    assert row == 2 and torch.equal(image, eval_transform(16)(read_image(paths[1])))


def test_loader_repeats_itself_whatever_the_workers(pictures):
    dataset = PairDataset(*pictures, train_transform(16))
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first = epochs(dataset, seed=1, num_workers=0)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])
    random.seed(5)  # the outside state must not matter
    assert same(first, epochs(dataset, seed=1, num_workers=0))
    assert same(first, epochs(dataset, seed=1, num_workers=2))
    assert not same(first, epochs(dataset, seed=2, num_workers=0))
    assert not same(first[:1], first[1:])


def test_loader_gives_every_row_once(pictures):
    dataset = PairDataset(*pictures, eval_transform(16))
    (batches,) = epochs(dataset, seed=0, num_workers=0, count=1)
    assert [len(rows) for _, rows in batches] == [3, 3, 2]
    assert sorted(torch.cat([rows for _, rows in batches]).tolist()) == list(range(8))
    for images, rows in batches:
        assert images.dtype == torch.uint8 and rows.dtype == torch.int64
        for image, row in zip(images, rows.tolist(), strict=True):
            assert torch.equal(image, dataset[row][0])
    assert len(list(pair_loader(dataset, 3, 0, 0, drop_last=True))) == 2


def test_loader_resumes_at_an_epoch(pictures):
    dataset = PairDataset(*pictures, train_transform(16))
    loader = pair_loader(dataset, 3, 1, 0)
    loader.epoch = 1
    assert same([list(loader)], epochs(dataset, seed=1, num_workers=0)[1:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_picture_is_one_line_from_the_loader(pictures, num_workers):
    records, paths = pictures
    cut_short(paths[1])
    loader = pair_loader(PairDataset(records, paths, eval_transform(16)), 3, 0, num_workers)
    line = input_error(list, loader)
    assert str(paths[1]) in line and "--skip_broken" in line


# ---- the text cache


class LengthEncoder:
    """Embeds a caption as (its length, its number of vowels) and notes what it was asked."""

    def __init__(self, fingerprint="0a"):
        self.asked = []
        self._fingerprint = fingerprint

    def fingerprint(self):
        return self._fingerprint

    def encode(self, captions):
        self.asked.append(list(captions))
        return torch.tensor([[float(len(c)), float(sum(x in "aeiou" for x in c))] for c in captions])


CAPTIONS = ["a dog", "two cats", "a dog", "tree"]
EMBEDDINGS = [[5.0, 2.0], [8.0, 2.0], [5.0, 2.0], [4.0, 2.0]]


@pytest.mark.parametrize("cached", [True, False])
def test_captions_are_embedded_once(tmp_path, cached):
    encoder = LengthEncoder()
    for _ in range(2):
        embeddings = embed_captions(CAPTIONS, encoder, tmp_path / "cache" if cached else None)
        assert embeddings.dtype == torch.float32 and embeddings.tolist() == EMBEDDINGS
    assert encoder.asked == [["a dog", "two cats", "tree"]] * (1 if cached else 2)
    names = [path.name for path in (tmp_path / "cache").iterdir()] if cached else []
    assert len(names) == cached and all(name.startswith("text_") for name in names)
    assert cached or list(tmp_path.iterdir()) == []


def test_other_captions_or_encoder_are_another_file(tmp_path):
    encoder = LengthEncoder()
    embed_captions(["ab", "c"], encoder, tmp_path)
    assert embed_captions(["a", "bc"], encoder, tmp_path).tolist() == [[1.0, 1.0], [2.0, 0.0]]
    assert len(encoder.asked) == 2
    other = LengthEncoder("0b")
    embed_captions(["ab", "c"], other, tmp_path)
    assert len(other.asked) == 1
    assert len(list(tmp_path.iterdir())) == 3


def wrong_rows(path):
    from safetensors.torch import save_file

    save_file({"text_embed": torch.zeros(2, 2)}, path)


def wrong_name(path):
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(3, 2)}, path)


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-3]), wrong_rows, wrong_name],
)
def test_damaged_cache_is_made_anew(tmp_path, capsys, damage):
    encoder = LengthEncoder()
    embed_captions(CAPTIONS, encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    assert embed_captions(CAPTIONS, encoder, tmp_path).tolist() == EMBEDDINGS
    printed = capsys.readouterr().out
    assert str(path) in printed and printed.count("\n") == 1
    assert embed_captions(CAPTIONS, encoder, tmp_path).tolist() == EMBEDDINGS
    assert len(encoder.asked) == 2 and capsys.readouterr().out == ""


def test_unwritable_cache_is_a_warning(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert embed_captions(CAPTIONS, LengthEncoder(), tmp_path / "file" / "cache").tolist() == EMBEDDINGS
    assert capsys.readouterr().out.count("\n") == 1

    def disk_full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", disk_full)
    assert embed_captions(CAPTIONS, LengthEncoder(), tmp_path / "full").tolist() == EMBEDDINGS
    assert "No space left" in capsys.readouterr().out
    assert list((tmp_path / "full").iterdir()) == []
