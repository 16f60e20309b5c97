"""Which snapshots of an expert are stored, how small, and how they are written while the next expert trains."""

import errno
import shutil
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import buffer
import evaluate
from data.errors import InputError
from networks.clip_model import CLIPModel, ProjectionHead
from networks.image_encoder import build_image_encoder
from tests.conftest import QUICK_BUFFER
from tests.programs import error_line
from utils.experts.trajectory import Trajectory, expert_path, save_trajectory
from utils.files import BackgroundSaver
from utils.sets import Pairs
from utils.student import StudentLoss, matching_gradient


@pytest.fixture(scope="module")
def kept(run_buffer, tmp_path_factory):
    """Buffer folder of one expert of four epochs that keeps 0, 1, 2 and 4, as by default in fp16."""
    folder = tmp_path_factory.mktemp("kept")
    assert run_buffer(folder, "--num_experts", 1, "--train_epochs", 4, "--keep_epochs", 2) == 0
    return folder


@pytest.fixture(scope="module")
def whole(run_buffer, tmp_path_factory):
    """The same expert with all its snapshots in fp32."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_buffer(folder, "--num_experts", 1, "--train_epochs", 4, "--snapshot_type", "fp32") == 0
    return folder


@pytest.fixture
def match(run_distill):
    quick = "--Iteration", 1, "--num_eval", 1, "--epoch_eval_train", 1, "--no_draw"
    return lambda folder, save_dir, *more: run_distill(save_dir, "--buffer_path", folder, *quick, *more)


def expert_of(root, number=0):
    return expert_path(root / "tiny" / "test_nfnet" / "demo", number)


# ---- which snapshots


def test_kept_snapshots_are_those_of_the_whole_trajectory(kept, whole):
    stored, full = Trajectory(expert_of(kept)), Trajectory(expert_of(whole))
    assert stored.epochs == [0, 1, 2, 4] and full.epochs == [0, 1, 2, 3, 4]
    assert len(stored.recalls) == 4
    assert stored.shapes() == full.shapes() == {name: tuple(v.shape) for name, v in full.snapshot(0).items()}
    for epoch in stored.epochs:
        left, right = stored.snapshot(epoch), full.snapshot(epoch)
        assert set(left) == set(right)
        for name in left:
            # fp16 keeps 11 bits of the difference to the first snapshot
            bound = 2.0**-11 * (right[name] - full.snapshot(0)[name]).abs().max() + 1e-7
            assert (left[name] - right[name]).abs().max() <= bound, name
    assert expert_of(kept).stat().st_size < 0.5 * expert_of(whole).stat().st_size


def test_distillation_reads_the_kept_snapshots_and_names_what_is_missing(kept, match, tmp_path, capsys):
    assert match(kept, tmp_path / "r") == 0
    line = error_line(capsys, match, kept, tmp_path / "x", "--max_start_epoch", 3)
    assert "epochs 3 " in line and "0, 1, 2, 4" in line and "--keep_epochs 3" in line
    line = error_line(capsys, match, kept, tmp_path / "x", "--expert_epochs", 2)
    assert "epochs 3 " in line and "--expert_epochs 2" in line
    assert not (tmp_path / "x").exists()


def test_all_data_row_is_the_last_snapshot(kept, match, tmp_path, capsys):
    assert match(kept, tmp_path / "r") == 0
    capsys.readouterr()
    assert evaluate.main(["--synset", str(tmp_path / "r/best.safetensors"), "--all_data", str(kept)]) == 0
    assert "| all data (1 expert, 4 epochs) | all |" in capsys.readouterr().out


def test_more_snapshots_than_an_expert_keeps(kept, run_buffer, tmp_path, capsys):
    line = error_line(capsys, run_buffer, kept, "--num_experts", 1, "--train_epochs", 4)
    assert str(expert_of(kept)) in line and "snapshots 3 " in line and "--keep_epochs" in line
    assert run_buffer(kept, "--num_experts", 1, "--train_epochs", 4, "--keep_epochs", 1) == 0
    line = error_line(capsys, run_buffer, tmp_path / "b", "--train_epochs", 2, "--keep_epochs", 3)
    assert "--keep_epochs 3" in line and "--train_epochs 2" in line
    assert not (tmp_path / "b").exists()


# ---- how small


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    encoder = build_image_encoder("test_nfnet", 32, pretrained=False)
    return CLIPModel(encoder, ProjectionHead(128, encoder.width)).eval()


def test_matching_loss_changes_by_less_than_1e_4(kept, whole, model):
    generator = torch.Generator().manual_seed(0)
    images, text_embed = torch.randn(6, 3, 32, 32, generator=generator), torch.randn(6, 128, generator=generator)
    experts = [Trajectory(expert_of(folder)).snapshot for folder in (whole, kept)]
    batches = [torch.arange(6)] * 4

    def losses(epoch, lr):
        pairs = Pairs(images, text_embed, torch.tensor(lr), torch.tensor(lr))
        for snapshot in experts:
            start, target = snapshot(epoch), snapshot(epoch + 1)
            yield matching_gradient(StudentLoss(model, 0.07), start, target, pairs, batches, 0).loss.item()

    for epoch in (0, 1):
        exact, stored = losses(epoch, 1e-3)
        assert exact > 2 and abs(stored - exact) < 1e-4  # 2 is a student that stays put
        exact, stored = losses(epoch, 1e-2)
        assert exact > 20 and abs(stored - exact) < 1e-4 * exact  # a student that went far astray: in proportion


@pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-30, 1.0, 1e30])
def test_differences_of_any_size(tmp_path, factor):
    first = torch.zeros(1000)
    later = factor * torch.linspace(-1, 1, 1000)
    snapshots = [{"text_projection.w": first}, {"text_projection.w": later}]
    save_trajectory(tmp_path / "e.safetensors", snapshots, {}, [], snapshot_type="fp16")
    stored = Trajectory(tmp_path / "e.safetensors").snapshot(1)["text_projection.w"]
    assert torch.isfinite(stored).all()
    assert (stored - later).abs().max() <= 2.0**-11 * factor + 1e-45


def test_experts_of_a_folder_share_the_start_of_the_image_tower(run_buffer, tmp_path, capsys):
    assert run_buffer(tmp_path, "--num_experts", 2, "--train_epochs", 1) == 0
    first, second = (Trajectory(expert_of(tmp_path, n)) for n in range(2))
    (start,) = first.path.parent.glob("start_*")
    assert "0/image_encoder.model.stem.conv1.weight" in first.handles
    assert all(torch.equal(v, second.snapshot(0)[n]) for n, v in first.snapshot(0).items() if n[0] == "i")
    written = start.stat().st_mtime_ns
    assert run_buffer(tmp_path, "--num_experts", 3, "--train_epochs", 1) == 0
    assert start.stat().st_mtime_ns == written
    content = start.read_bytes()
    start.write_bytes(content[:-10])
    assert str(start) in error_line(capsys, run_buffer, tmp_path, "--num_experts", 3, "--train_epochs", 1)
    start.unlink()
    line = error_line(capsys, run_buffer, tmp_path, "--num_experts", 3, "--train_epochs", 1)
    assert str(first.path) in line and start.name in line
    for path in (first.path, second.path, expert_of(tmp_path, 2)):
        path.unlink()
    start.write_bytes(content[:-10])  # damaged and needed: written again
    assert run_buffer(tmp_path, "--num_experts", 1, "--train_epochs", 1) == 0
    assert start.stat().st_size == len(content)
    assert Trajectory(first.path).shapes()


def test_start_of_other_weights_is_refused(kept, run_buffer, match, tmp_path, capsys):
    shutil.copytree(kept, tmp_path / "b")
    other = tmp_path / "o"
    assert run_buffer(other, "--num_experts", 1, "--train_epochs", 1, "--no_image_pretrained") == 0
    (start,) = expert_of(tmp_path / "b").parent.glob("start_*")
    tensors = {f"0/{n}": v for n, v in Trajectory(expert_of(other)).snapshot(0).items() if n.startswith("image")}
    save_trajectory(other / "e.safetensors", [{n[2:]: v + 1 for n, v in tensors.items()}], {}, [], shares_start=True)
    (wrong,) = other.glob("start_*")
    shutil.copy(wrong, start)
    assert str(start) in error_line(capsys, match, tmp_path / "b", tmp_path / "r")


def test_random_starts_are_not_shared(tiny_argv, tmp_path):
    checkpoint = tiny_argv.index("--image_checkpoint")
    argv = [*tiny_argv[:checkpoint], *tiny_argv[checkpoint + 2 :], "--no_image_pretrained", *QUICK_BUFFER]
    argv += ["--num_experts", "2", "--train_epochs", "1", "--buffer_path", str(tmp_path)]
    assert buffer.main(argv) == 0
    assert not list(tmp_path.rglob("start_*"))
    first, second = (Trajectory(expert_of(tmp_path, n)).snapshot(0) for n in range(2))
    name = "image_encoder.model.stem.conv1.weight"
    assert not torch.equal(first[name], second[name])


# ---- saved while training goes on


def test_save_runs_beside_and_its_error_comes_back():
    release, begun = threading.Event(), threading.Event()

    def save(fails):
        begun.set()
        release.wait(10)
        if fails:
            raise InputError("cannot write")

    with pytest.raises(InputError, match="cannot write"), BackgroundSaver() as saver:
        saver.submit(save, True)
        assert begun.wait(10)
        saver.check()  # still running: nothing to raise, no waiting
        release.set()
    with pytest.raises(InputError, match="cannot write"), BackgroundSaver() as saver:
        saver.submit(save, True)
        saver.submit(save, False)
    done = []
    with pytest.raises(KeyboardInterrupt), BackgroundSaver() as saver:
        saver.submit(done.append, 1)
        raise KeyboardInterrupt
    assert done == [1]


def test_full_disk_is_one_line_and_leaves_no_file(run_buffer, tmp_path, capsys, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.files.save_file", fail)
    line = error_line(capsys, run_buffer, tmp_path, "--num_experts", 3, "--train_epochs", 1)
    assert "No space left" in line
    assert [path.name for path in expert_of(tmp_path).parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite_is_named(experts, run_distill, tmp_path, capsys, value):
    """Where it is read, not hours later in a drawing."""
    shutil.copytree(experts, tmp_path / "b")
    broken, other = sorted((tmp_path / "b").rglob("expert_*.safetensors"))
    other.unlink()
    with safe_open(broken, "pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118, a handle is no dict
        metadata = handle.metadata()
    for key, tensor in tensors.items():
        if key.startswith(("1/", "2/")):
            tensors[key] = torch.full(tensor.shape, value)
    broken.unlink()
    save_file(tensors, broken, metadata)
    line = error_line(capsys, run_distill, tmp_path / "r", "--Iteration", 2, "--buffer_path", tmp_path / "b")
    assert line.startswith("error: expert ") and broken.name in line and "not finite" in line
