"""Files that the code before this layout wrote (tests/fixtures/previous_layout/make.sh) are read and continued."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import distill
import evaluate
from data.demo import make_demo
from networks.clip_model import trained_parameters
from tests.programs import error_line
from utils.experts import check_epochs, find_trajectories
from utils.sets import load_synset
from utils.setup import make_factory

FIXTURES = Path(__file__).parent / "fixtures/previous_layout"
# As in make.sh.
ARGV = [
    *("--dataset", "tiny", "--image_root", "tiny", "--ann_root", "tiny", "--image_size", "16"),
    *("--image_encoder", "test_vit", "--image_checkpoint", "vit.safetensors"),
    *("--image_kwargs", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2", "--text_encoder", "demo"),
    *("--text_pooling", "mean", "--num_workers", "0", "--device", "cpu", "--cache_dir", "cache", "--disabled_wandb"),
    *("--buffer_path", "buffers", "--lr_teacher_img", "0.01", "--lr_teacher_txt", "0.1"),
    *("--num_queries", "3", "--mini_batch_size", "2", "--syn_steps", "2", "--eval_it", "2", "--num_eval", "1"),
    *("--epoch_eval_train", "2", "--lr_img", "1", "--lr_txt", "1", "--lr_lr", "1e-8", "--no_draw", "--no_report"),
]


@pytest.fixture
def previous(tmp_path, monkeypatch):
    """A copy of the files with the data they were made of, as the current folder."""
    folder = tmp_path / "previous"
    shutil.copytree(FIXTURES, folder)
    make_demo(folder / "tiny", num_train=8, num_val=4, num_test=4, image_size=32)
    for split in ("train", "val", "test"):
        (folder / f"tiny/demo_{split}.json").rename(folder / f"tiny/tiny_{split}.json")
    monkeypatch.chdir(folder)
    return folder


def test_fixtures_are_small_and_name_no_machine():
    files = [path for path in FIXTURES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000
    assert not [path for path in files for root in (b"/tmp/", b"/home/", b"/root/") if root in path.read_bytes()]


def test_expert_is_found_and_read(previous):
    args = distill.parse_args(ARGV)
    parameters = trained_parameters(make_factory(args, 128).fresh(0))
    (expert,) = find_trajectories("buffers", vars(args), parameters)
    check_epochs([expert], args.max_start_epoch, args.expert_epochs)
    known = json.loads((previous / "expert_000.json").read_text())
    assert expert.recalls == known["recalls"] and [str(epoch) for epoch in expert.epochs] == list(known["sums"])
    for epoch, sums in known["sums"].items():
        snapshot = expert.snapshot(int(epoch))
        assert set(snapshot) == set(parameters) == set(sums)
        for name, value in snapshot.items():
            assert value.double().abs().sum().item() == pytest.approx(sums[name], rel=1e-9), (epoch, name)


def test_set_is_read_and_trained_on(previous, capsys):
    synset = load_synset("run/best.safetensors")
    assert synset.image_syn.shape == (3, 3, 16, 16) and synset.text_syn.shape == (3, 128)
    assert (synset.syn_lr_img, synset.syn_lr_txt) == pytest.approx((0.01, 0.1))
    rows = json.loads((previous / "tiny/tiny_train.json").read_text())
    assert set(synset.captions) <= {row["caption"].strip(".").lower() for row in rows}
    assert (synset.settings["method"], synset.settings["iteration"]) == ("initial", 0)
    assert evaluate.main(["--synset", "run/best.safetensors", "--all_data", "buffers"]) == 0
    out = capsys.readouterr().out
    assert "| best (initial) | 3 | test_vit |" in out and "| all data (1 expert, 2 epochs) |" in out


def test_run_goes_on_as_it_would_have(previous, capsys):
    resume = [*ARGV, "--save_dir", "run", "--Iteration", "3", "--resume"]
    # Its student had the experts' temperature.
    assert "student_temperature=0.07" in error_line(capsys, distill.main, resume)
    assert distill.main([*resume, "--student_temperature", "0.07"]) == 0
    last, known, before = (
        load_synset(path)
        for path in ("run/last.safetensors", "continued.safetensors", FIXTURES / "run/last.safetensors")
    )
    assert last.settings["iteration"] == known.settings["iteration"] == 3 and before.settings["iteration"] == 2
    for name in ("image_syn", "text_syn", "syn_lr_img", "syn_lr_txt"):
        now, then, start = (torch.as_tensor(getattr(synset, name)) for synset in (last, known, before))
        assert torch.allclose(now, then, atol=1e-5), name
        assert not torch.allclose(then, start, atol=1e-5), name  # the step can be seen
    assert last.captions == known.captions
