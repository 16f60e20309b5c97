"""Trajectories and sets of pairs on disk: round trips, the released layout, damage, a full disk."""

import errno
import math
import os
import socket
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from data.whole import replacing
from tests.programs import input_error
from utils import files
from utils.experts.trajectory import Trajectory, buffer_folder, expert_path, find_trajectories, save_trajectory
from utils.files import open_tensors, save_tensors
from utils.sets import SynSet, before_and_after, load_synset, picture_grid, save_synset

SETTINGS = {
    **{"dataset": "tiny", "image_encoder": "test_vit", "text_encoder": "a/b", "text_pooling": "cls"},
    **{"image_size": 32, "image_trainable": True},
}
SHAPES = {"image_encoder.w": (2, 3), "image_encoder.b": (2,), "text_projection.w": (4,)}


def draw_snapshots(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(count)]


def equal(left, right):
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def write_expert(root, number=0, settings=SETTINGS):
    path = expert_path(buffer_folder(root, settings), number)
    save_trajectory(path, draw_snapshots(number), settings, [{"r_mean": 1.0}, {"r_mean": 2.0}])
    return path


def find(root, **kwargs):
    settings = SETTINGS | kwargs.pop("settings", {})
    return find_trajectories(root, settings, draw_snapshots(9)[0], **kwargs)


# ---- trajectories


def test_trajectory_round_trip(tmp_path):
    trajectory = Trajectory(write_expert(tmp_path))
    assert trajectory.epochs == [0, 1, 2]
    assert trajectory.settings == SETTINGS
    assert trajectory.recalls == [{"r_mean": 1.0}, {"r_mean": 2.0}]
    assert trajectory.names() == set(SHAPES)
    for epoch, snapshot in enumerate(draw_snapshots(0)):
        stored = trajectory.snapshot(epoch)
        assert set(stored) == set(snapshot)
        assert all(torch.equal(stored[name], snapshot[name]) for name in snapshot)


def test_epoch_1_is_not_epoch_10(tmp_path):
    snapshots = [{"image_encoder.w": torch.tensor([float(epoch)])} for epoch in range(12)]
    save_trajectory(tmp_path / "expert.safetensors", snapshots, {}, [])
    trajectory = Trajectory(tmp_path / "expert.safetensors")
    assert [trajectory.snapshot(epoch)["image_encoder.w"].item() for epoch in range(12)] == list(range(12))


def test_experts_are_found_from_both_folders_in_order(tmp_path):
    for number in (5, 2, 7, 0, 4, 1, 6, 3):
        path = write_expert(tmp_path, number)
    for root in (tmp_path, path.parent):
        assert [t.path.name for t in find(root)] == [f"expert_00{n}.safetensors" for n in range(8)]
    assert [t.path.name for t in find(tmp_path, max_files=2)] == ["expert_000.safetensors", "expert_001.safetensors"]


def test_no_expert_names_the_folders_tried(tmp_path):
    line = input_error(find, tmp_path)
    assert str(tmp_path / "tiny" / "test_vit" / "a--b") in line and f"{tmp_path}," in line.replace(")", ",")
    assert "buffer.py" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_encoder", "nfnet"), ("text_encoder", "bert"), ("text_pooling", "mean"), ("image_size", 64)]
    + [("image_trainable", False)],
)
def test_expert_of_other_settings_is_refused(tmp_path, key, value):
    folder = write_expert(tmp_path).parent
    line = input_error(find, folder, settings={key: value})
    assert f"{key}={SETTINGS[key]}" in line and f"{key}={value}" in line


@pytest.mark.parametrize(
    "parameters",
    [{"image_encoder.w": torch.zeros(2, 3)}, {name: torch.zeros(7) for name in SHAPES}],
    ids=["fewer", "other shapes"],
)
def test_expert_of_another_model_is_refused(tmp_path, parameters):
    path = write_expert(tmp_path)
    assert str(path) in input_error(find_trajectories, tmp_path, SETTINGS, parameters)


@pytest.mark.parametrize("length", [0, 5, 60, 300])
def test_truncated_expert(tmp_path, length):
    path = write_expert(tmp_path)
    content = path.read_bytes()
    assert length < len(content)
    path.write_bytes(content[:length])
    line = input_error(find, tmp_path)
    assert str(path) in line and "damaged" in line


# ---- the released layout


def write_released(folder, number, experts):
    """Lists of experts of snapshots of tensors, without names."""
    for tower, prefix in (("img", "image_encoder."), ("txt", "text_projection.")):
        content = [
            [[value for name, value in snapshot.items() if name.startswith(prefix)] for snapshot in snapshots]
            for snapshots in experts
        ]
        torch.save(content, folder / f"{tower}_replay_buffer_{number}.pt")


def test_released_layout(tmp_path):
    experts = [draw_snapshots(seed) for seed in range(3)]
    write_released(tmp_path, 0, experts[:2])
    write_released(tmp_path, 1, experts[2:])
    found = find(tmp_path)
    assert [trajectory.epochs for trajectory in found] == [[0, 1, 2]] * 3
    for trajectory, snapshots in zip(found, experts, strict=True):
        assert all(equal(trajectory.snapshot(epoch), snapshots[epoch]) for epoch in range(3))
    assert [t.path.name for t in find(tmp_path, max_files=1)] == ["img_replay_buffer_0.pt"] * 2
    assert len(find(tmp_path, max_experts=1)) == 2


def test_released_experts_in_half_precision_are_read_in_single(tmp_path):
    snapshots = draw_snapshots(0)
    write_released(tmp_path, 0, [[{name: value.half() for name, value in snapshot.items()} for snapshot in snapshots]])
    (trajectory,) = find(tmp_path)
    expected = {name: value.half().float() for name, value in snapshots[1].items()}
    assert {value.dtype for value in trajectory.snapshot(1).values()} == {torch.float32}
    assert equal(trajectory.snapshot(1), expected)


def test_large_finite_values_are_finite(tmp_path):
    """Their sum is not."""
    snapshots = [{name: torch.full_like(value, 2e38) for name, value in s.items()} for s in draw_snapshots(0)]
    write_released(tmp_path, 0, [snapshots])
    assert equal(find(tmp_path)[0].snapshot(1), snapshots[1])
    snapshots[1][next(iter(snapshots[1]))].view(-1)[0] = math.nan
    write_released(tmp_path, 0, [snapshots])
    assert "not finite" in input_error(find(tmp_path)[0].snapshot, 1)


def test_released_layout_lies_where_the_released_script_wrote_it(tmp_path):
    folder = tmp_path / "tiny" / "test_vit" / "a--b"
    folder.mkdir(parents=True)
    write_released(folder, 0, [draw_snapshots(0)])
    assert len(find(tmp_path)) == 1


def test_released_layout_damaged_incomplete_or_of_another_model(tmp_path):
    write_released(tmp_path, 0, [draw_snapshots(0)])
    image_path, text_path = (tmp_path / f"{tower}_replay_buffer_0.pt" for tower in ("img", "txt"))
    line = input_error(
        find_trajectories, tmp_path, SETTINGS, {**draw_snapshots(0)[0], "text_projection.b": torch.ones(1)}
    )
    assert str(image_path) in line
    content = image_path.read_bytes()
    for damaged in (b"", b"nonsense", content[: len(content) // 2]):
        image_path.write_bytes(damaged)
        assert str(image_path) in input_error(find, tmp_path)
    image_path.write_bytes(content)
    text_path.unlink()
    assert text_path.name in input_error(find, tmp_path)


# ---- sets of pairs


@pytest.fixture
def synset():
    generator = torch.Generator().manual_seed(0)
    return SynSet(
        image_syn=torch.randn(3, 3, 8, 8, generator=generator),
        text_syn=torch.randn(3, 5, generator=generator),
        syn_lr_img=0.125,
        syn_lr_txt=0.5,
        captions=["a dog", "zwei Hunde, größer", "three"],
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        settings={"method": "distilled", "iteration": 7, "image_kwargs": {"a": None}},
    )


def test_synset_round_trip(tmp_path, synset):
    path = tmp_path / "new folder" / "set.safetensors"
    save_synset(path, synset)
    loaded = load_synset(path)
    assert torch.equal(loaded.image_syn, synset.image_syn)
    assert torch.equal(loaded.text_syn, synset.text_syn)
    for key in ("syn_lr_img", "syn_lr_txt", "captions", "mean", "std", "settings"):
        assert getattr(loaded, key) == getattr(synset, key), key
    assert [p.name for p in path.parent.iterdir()] == ["set.safetensors"]


def test_synset_in_channels_last_keeps_its_values(tmp_path, synset):
    expected = synset.image_syn.clone()
    synset.image_syn = synset.image_syn.to(memory_format=torch.channels_last)
    save_synset(tmp_path / "set.safetensors", synset)
    assert torch.equal(load_synset(tmp_path / "set.safetensors").image_syn, expected)


def test_file_that_is_not_a_synset(tmp_path, synset):
    path = tmp_path / "set.safetensors"
    assert f"{path} does not exist" in input_error(load_synset, path)
    for content in (b"", b"nonsense" * 20):
        path.write_bytes(content)
        assert f"{path} is damaged" in input_error(load_synset, path)
    save_file({"a": torch.ones(1)}, path)
    assert f"{path} is not a set of pairs" in input_error(load_synset, path)
    expert = write_expert(tmp_path)
    assert f"{expert} is not a set of pairs" in input_error(load_synset, expert)
    save_synset(path, synset)
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path} is damaged" in input_error(load_synset, path)


def test_folder_instead_of_a_file(tmp_path):
    assert str(tmp_path) in input_error(load_synset, tmp_path)


@pytest.mark.parametrize(("count", "columns", "rows"), [(3, 10, 1), (3, 2, 2)])
def test_picture_grid(synset, count, columns, rows):
    grid = picture_grid(synset, columns=columns, side=40, lines=2)
    line_height, margin = 40 // 11, 4
    assert grid.size == (min(columns, count) * 44 + margin, rows * (40 + 2 * line_height + margin) + margin)


def test_picture_grid_shows_pictures_in_their_colours(synset):
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mean, std = torch.tensor(synset.mean), torch.tensor(synset.std)
    synset.image_syn = ((colours - mean) / std)[:, :, None, None].expand(3, 3, 8, 8)
    grid = picture_grid(synset, columns=2, side=40, lines=2)
    height = 40 + 2 * (40 // 11) + 4
    places = [(24, 24), (24 + 44, 24), (24, 24 + height)]
    assert [grid.getpixel(place) for place in places] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_before_and_after_shows_both_and_the_change(synset):
    """Three plain grey pictures, brighter by 0.1 and darker by 0.05 afterwards; mean and std of the two sets differ."""
    before, after = (torch.tensor(v).view(3, 1, 1, 1).expand(3, 3, 8, 8) for v in ((0.4,) * 3, (0.5, 0.35, 0.4)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (synset.mean, synset.std))
    first = replace(synset, image_syn=(before - mean) / std)
    last = replace(synset, image_syn=(after - 0.5) / 0.25, mean=(0.5,) * 3, std=(0.25,) * 3)
    page = before_and_after(first, last, count=2, side=40, gain=4)
    shown = {colour for _, colour in page.getcolors(page.width * page.height)}
    levels = [round(255 * level) for level in (0.4, 0.5, 0.35, 0.5 + 4 * 0.1, 0.5 - 4 * 0.05)]
    assert {(level,) * 3 for level in levels} <= shown
    assert page.width == 2 * 48 + 8


def test_before_and_after_of_two_runs(synset):
    other = replace(synset, image_syn=torch.zeros(3, 3, 4, 4))
    assert "(3, 3, 8, 8) and (3, 3, 4, 4)" in input_error(before_and_after, synset, other)


# ---- writing whole or not at all


def fill_disk(monkeypatch, error):
    def save(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(files, "save_file", save)


def test_full_disk_leaves_the_previous_file_and_no_other(tmp_path, monkeypatch, synset):
    path = tmp_path / "set.safetensors"
    save_synset(path, synset)
    before = path.read_bytes()
    fill_disk(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    line = input_error(save_synset, path, synset)
    assert str(path) in line and "No space left" in line
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["set.safetensors"]


def test_interrupted_save_leaves_the_previous_file_and_no_other(tmp_path, monkeypatch, synset):
    path = tmp_path / "set.safetensors"
    save_synset(path, synset)
    before = path.read_bytes()
    fill_disk(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save_synset(path, synset)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["set.safetensors"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    line = input_error(save_tensors, tmp_path / "file" / "set.safetensors", {"a": torch.ones(1)}, {})
    assert str(tmp_path / "file") in line


def test_metadata_of_any_json_value(tmp_path):
    metadata = {"kind": "test", "nested": {"a": [1, None, "ü"]}}
    save_tensors(tmp_path / "x", {"a": torch.arange(6).view(2, 3).T}, metadata)
    handle, loaded = open_tensors(tmp_path / "x", "test")
    assert loaded == metadata
    assert handle.get_tensor("a").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    """Of this host, and of processes that are gone: others may still be writing."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    names = {
        f".a.safetensors.{host}.{ended.pid}.tmp": False,
        f".a.safetensors.{host}.{os.getppid()}.tmp": True,
        f".a.safetensors.another.{host}x.{ended.pid}.tmp": True,
        f".{host}.tmp": True,
        f"a.{host}.{ended.pid}.tmp": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"half")
    save_tensors(tmp_path / "b.safetensors", {"x": torch.ones(1)}, {"kind": "x"})
    assert {name: (tmp_path / name / "half").exists() for name in names} == names
    assert len(os.listdir(tmp_path)) == len([name for name in names.values() if name]) + 1


def test_a_file_that_cannot_be_made_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), replacing(path, sync=True) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a"]
    with replacing(path, sync=True) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["a"]
