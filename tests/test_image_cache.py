"""The cache of decoded pictures, the augmentation of tensors, and buffer.py with both."""

import errno
import math
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from data.augment import Augment, cached_side
from data.caches import pictures as image_cache
from data.caches.pictures import cache_images
from data.errors import InputError
from data.pairs import load_images
from tests.programs import error_line
from utils.experts.trajectory import Trajectory, expert_path


@pytest.fixture
def paths(tmp_path):
    """Five pictures of various shapes."""
    generator = np.random.default_rng(0)
    found = []
    for i, size in enumerate([(20, 30), (30, 20), (16, 16), (50, 8), (9, 40)]):
        found.append(tmp_path / f"{i}.png")
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(found[-1])
    return found


def files(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_cache_holds_the_resized_pictures_and_is_made_once(paths, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_cache, "BLOCK", 2)
    expected = load_images(paths, 18)
    cache = cache_images(paths, 18, tmp_path / "c")
    out = capsys.readouterr().out
    assert "5 pictures of 18 px" in out and str(cache.path) in out and len(out.splitlines()) == 1
    assert len(cache) == 5 and all(torch.equal(cache[i], expected[i]) for i in range(5))
    cache[0][:] = 0  # a copy: the file stays as it is
    assert cache.path.stat().st_size == 5 * 3 * 18 * 18 + 128
    written = cache.path.stat().st_mtime_ns
    again = pickle.loads(pickle.dumps(cache_images(paths, 18, tmp_path / "c")))
    assert torch.equal(again[4], expected[4]) and again.path.stat().st_mtime_ns == written
    assert capsys.readouterr().out == "" and files(tmp_path / "c") == [cache.path.name]


def test_other_pictures_sizes_or_sides_get_another_file(paths, tmp_path):
    first = cache_images(paths, 18, tmp_path / "c")
    assert cache_images(paths, 20, tmp_path / "c").path != first.path
    assert cache_images(paths[::-1], 18, tmp_path / "c").path != first.path
    Image.new("RGB", (40, 40), "red").save(paths[0])
    stale = cache_images(paths, 18, tmp_path / "c")
    assert stale.path != first.path and stale[0][0].min() == 255


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "nonsense", "cut"])
def test_damaged_cache_is_made_anew(paths, tmp_path, capsys, content):
    path = cache_images(paths, 18, tmp_path).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-10] if content is None else content)
    capsys.readouterr()
    cache_images(paths, 18, tmp_path)
    assert f"cannot use {path}" in capsys.readouterr().out
    assert path.read_bytes() == whole


def test_nothing_is_left_by_a_cache_that_cannot_be_made(paths, tmp_path, monkeypatch):
    folder = tmp_path / "c"
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4000))
    with pytest.raises(InputError, match="0.00 GB needed, 0.00 GB free.*--cache_dir"):
        cache_images(paths, 18, folder)
    monkeypatch.undo()

    def fail(paths, side):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_cache, "load_images", fail)
    with pytest.raises(InputError, match="No space left"):
        cache_images(paths, 18, folder)
    monkeypatch.undo()
    paths[3].write_bytes(b"broken")
    with pytest.raises(InputError, match="3.png"):
        cache_images(paths, 18, folder)
    assert files(folder) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache_dir"):
        cache_images(paths[:3], 18, tmp_path / "file")


# ---- augmentation


def test_each_picture_of_a_batch_is_augmented_by_itself():
    assert cached_side(224) == 256 and cached_side(224, no_aug=True) == 224
    augment = pickle.loads(pickle.dumps(Augment(28)))
    ramp = torch.arange(32 * 32).reshape(1, 32, 32).expand(3, -1, -1) // 4
    images = ramp.to(torch.uint8).repeat(64, 1, 1, 1)
    torch.manual_seed(0)
    out = augment(images)
    assert out.shape == (64, 3, 28, 28) and out.dtype == torch.uint8
    assert len({tuple(image.flatten().tolist()) for image in out}) > 60
    flipped = (out[..., 0].float().mean(dim=(1, 2)) > out[..., -1].float().mean(dim=(1, 2))).float().mean()
    assert 0.3 < flipped < 0.7
    torch.manual_seed(0)
    assert torch.equal(augment(images), out)
    assert augment.one(images[0]).shape == (3, 28, 28)


def test_affine_operations_are_torchvisions():
    """In every direction; near the edge, where a filled pixel is blended in twice there, they may differ."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 8, 8, generator=generator)
    images = (torch.nn.functional.interpolate(coarse, 64, mode="bilinear") * 255).to(torch.uint8)
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    shear, shift = math.degrees(math.atan(0.15)), 1  # 0.5 * 10 / 224 of 64 pixels
    changes = [
        {name: value}
        for sign in (-1, 1)
        for name, value in (
            ("shear", [sign * shear, 0.0]),
            ("shear", [0.0, sign * shear]),
            ("translate", [sign * shift, 0]),
            ("translate", [0, sign * shift]),
            ("angle", sign * 15.0),
        )
    ]
    expected = [
        v2.functional.affine(images, **{**still, **change}, interpolation=v2.InterpolationMode.BILINEAR)
        for change in changes
    ]
    for operation in Augment(64).operations[4:]:
        value = operation(images)[..., 14:-14, 14:-14].int()
        apart = [(value - other[..., 14:-14, 14:-14].int()).abs().max().item() for other in expected]
        assert min(apart) <= 1
        expected.pop(apart.index(min(apart)))
    assert expected == []


def test_operations_keep_batches_and_singles_alike():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(40, 200, (4, 3, 28, 28), dtype=torch.uint8, generator=generator)
    for operation in Augment(28).operations:
        assert torch.equal(operation(images), torch.stack([operation(image[None])[0] for image in images]))
        assert not torch.equal(operation(images), images)


# ---- buffer.py --cache_images


@pytest.fixture
def train(run_buffer):
    """buffer.py with cached pictures, for an epoch."""
    quick = "--cache_images", "--num_experts", 1, "--train_epochs", 1
    return lambda folder, *more: run_buffer(folder, *quick, *more)


def last_snapshot(folder):
    trajectory = Trajectory(expert_path(folder / "tiny" / "test_nfnet" / "demo", 0))
    return trajectory.snapshot(trajectory.epochs[-1])


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_cached_training_does_not_depend_on_workers(train, tmp_path, capsys):
    for workers in (0, 2):
        argv = ["--cache_dir", tmp_path / "c", "--num_workers", workers]
        assert train(tmp_path / f"b{workers}", *argv) == 0
    assert capsys.readouterr().out.count("caching 24 pictures of 37 px") == 1
    assert same(last_snapshot(tmp_path / "b0"), last_snapshot(tmp_path / "b2"))


def test_without_augmentation_the_cache_changes_nothing(train, tmp_path):
    assert train(tmp_path / "cached", "--no_aug", "--cache_dir", tmp_path / "c") == 0
    assert train(tmp_path / "decoded", "--no_aug", "--cache_images=false") == 0
    assert same(last_snapshot(tmp_path / "cached"), last_snapshot(tmp_path / "decoded"))


def test_augmentation_on_the_device(train, tmp_path, monkeypatch):
    """As on a GPU: the loader gives squares as they are cached, and the batch is augmented."""
    seen = []
    monkeypatch.setattr("utils.setup.data.augments_on", lambda device: True)
    call = Augment.__call__
    monkeypatch.setattr(Augment, "__call__", lambda self, images: (seen.append(images.shape), call(self, images))[1])
    assert train(tmp_path / "b", "--cache_dir", tmp_path / "c") == 0
    assert seen == [(60, 3, 37, 37), (60, 3, 37, 37)]


def test_experts_with_and_without_the_cache_do_not_mix(train, tmp_path, capsys):
    assert train(tmp_path / "b", "--cache_dir", tmp_path / "c") == 0
    more = "--num_experts", 2, "--cache_images=false"
    assert "cache_images=True" in error_line(capsys, train, tmp_path / "b", *more)
