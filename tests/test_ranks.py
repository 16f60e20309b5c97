"""Two processes over gloo against one: ranks, buffer.py, evaluate.py, coreset.py, and how all of them end."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import buffer
import coreset
import evaluate
from data.errors import InputError
from networks.image_encoder import build_image_encoder
from tests.conftest import QUICK_BUFFER
from tests.processes import Ranks, run_ranks
from utils import cli, ranks
from utils.experts import ExpertLocks, Trajectory, clear_stale
from utils.scoring import embed_views
from utils.sets import load_synset

FOLDER = "tiny/test_nfnet/demo"


@pytest.fixture
def both(tmp_path, capsys):
    """Runs a script in this process and as two ranks, {} in its arguments being a folder of each: what both printed."""

    def run(script, *argv):
        one, two = ([str(argument).replace("{}", str(tmp_path / name)) for argument in argv] for name in ("1", "2"))
        capsys.readouterr()
        assert script.main(one) == 0
        first, second = run_ranks(tmp_path / "printed", 2, script.main, two)
        assert (first.code, second.code, second.out) == (0, 0, ""), first.err + second.err
        return capsys.readouterr().out.replace(str(tmp_path / "1"), "{}"), first.out.replace(str(tmp_path / "2"), "{}")

    return run


# ---- the group


def exchange():
    ranks.start()
    rank = ranks.rank()
    assert (ranks.count(), ranks.is_first()) == (2, rank == 0)
    assert ranks.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    made = ranks.spread(lambda item: (item, rank, ranks.count()), "abcde")
    assert made == [("a", 0, 1), ("b", 1, 1), ("c", 0, 1), ("d", 1, 1), ("e", 0, 1)]
    assert [list(ranks.share_of(5, r)) for r in range(2)] == [[0, 1], [2, 3, 4]]
    rows = torch.arange(10.0).view(5, 2)
    own = rows[ranks.share_of(5).start : ranks.share_of(5).stop]
    assert torch.equal(ranks.gather_rows(own, [2, 3]), rows)
    assert torch.equal(ranks.gather_rows(rows[:1] if rank else rows[:0], [0, 1]), rows[:1])
    image, number = torch.full((2, 3, 2, 2), 1.0 + rank).to(memory_format=torch.channels_last), torch.tensor(2.0)
    ranks.add_up([image, number])
    assert (image == 3).all() and number == 4
    with ranks.alone():
        assert ranks.count() == 1 and ranks.gather(rank) == [rank]
    print("seen by the first")
    ranks.end()
    return 0


def test_what_ranks_exchange(tmp_path):
    first, second = run_ranks(tmp_path, 2, exchange)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (first.out, second.out) == ("seen by the first\n", "")


def test_without_torchrun_there_is_no_group(monkeypatch):
    ranks.start()
    assert not torch.distributed.is_initialized()
    assert (ranks.count(), ranks.rank()) == (1, 0)
    assert ranks.gather(5) == [5] and ranks.spread(abs, [-1, 2]) == [1, 2] and ranks.share_of(3) == range(3)


def test_each_rank_has_its_own_card(monkeypatch):
    monkeypatch.setattr(ranks, "_group", ranks._Group(1, 2, None))
    with pytest.raises(InputError, match="--device cuda:0 is one card"):
        ranks.device("cuda:0")
    assert ranks.device("cpu") == torch.device("cpu")


# ---- how they end


def end_with(how):
    @cli.one_line_errors
    def main(argv):
        assert ranks.gather(0) == [0, 0]
        if how == "all":
            raise InputError("bad; mend it")
        if ranks.rank() == 1:
            if how == "one":
                raise InputError("bad; mend it")
            os.kill(os.getpid(), how)
        ranks.wait()

    return main(None)


@pytest.mark.parametrize(
    ("how", "codes", "line"),
    [
        ("one", [2, 2], "error: bad; mend it"),
        ("all", [2, 2], "error: bad; mend it"),
        (signal.SIGKILL, [2, -signal.SIGKILL], "error: a rank was lost"),
        (signal.SIGTERM, [2, 2], "error: a rank was lost"),
        (signal.SIGINT, [2, 130], "interrupted"),
    ],
)
def test_all_end_with_one_line(how, codes, line, tmp_path):
    run_ranks(tmp_path / "none", 1, int)  # starts what they are forked off, if none has yet
    started = time.monotonic()
    ended = run_ranks(tmp_path, 2, end_with, how)
    assert [end.code for end in ended] == codes
    (said,) = "".join(end.err for end in ended).splitlines()
    assert said.startswith(line)
    assert time.monotonic() - started < 20


def test_a_wrong_flag_is_one_line(tmp_path):
    ended = run_ranks(tmp_path, 2, buffer.main, ["--num_expert", "1"])
    assert [end.code for end in ended] == [2, 2]
    assert sum(end.err.count("--num_experts") for end in ended) == 1


SCRIPT = """
import sys
from data.errors import InputError
from networks.image_encoder import build_image_encoder
from utils import cli, ranks

@cli.one_line_errors
def main(argv=None):
    print(ranks.gather(ranks.rank()))
    if ranks.rank() == 1:
        raise InputError("bad; mend it")
    ranks.wait()

sys.exit(main())
"""


def test_torchrun_itself(tmp_path):
    """It tells in its own words how a rank ended, and exits with 1."""
    (tmp_path / "script.py").write_text(SCRIPT)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv.append(str(tmp_path / "script.py"))
    environment = {**os.environ, "PYTHONPATH": str(Path(buffer.__file__).parent)}
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=240, env=environment)
    assert ended.stdout == "[0, 1]\n"
    assert re.findall("^error: .*", ended.stderr, re.MULTILINE) == ["error: bad; mend it"]
    assert re.search(r"exitcode +: 2 ", ended.stderr) and ended.returncode == 1


# ---- buffer.py


def test_experts_are_those_of_one_process(tiny_argv, both, metrics, tmp_path):
    argv = [*tiny_argv, *QUICK_BUFFER, "--train_epochs", 1, "--num_experts", 3, "--buffer_path", "{}"]
    printed = both(buffer, *argv)
    assert printed[0].splitlines()[-1] == printed[1].splitlines()[-1]
    folders = [tmp_path / name / FOLDER for name in ("1", "2")]
    assert len(os.listdir(folders[0])) == 5 and set(os.listdir(folders[0])) == set(os.listdir(folders[1]))
    for n in range(3):
        one, two = (Trajectory(folder / f"expert_00{n}.safetensors") for folder in folders)
        assert one.recalls == two.recalls
        for epoch in (0, 1):
            left, right = one.snapshot(epoch), two.snapshot(epoch)
            assert all(torch.equal(left[name], right[name]) for name in left)
    for one, two in zip(*map(metrics, folders), strict=True):
        assert one | {"Seconds": 0} == two | {"Seconds": 0}


def embed(tiny_data, folder):
    """Eight pictures in batches of three, three views of each."""
    ranks.start()
    paths = sorted(tiny_data.glob("demo-images/val_*.png"))
    torch.manual_seed(0)
    encoder = build_image_encoder("test_nfnet", 32, pretrained=False)
    for views in (0, 3):
        shared = embed_views(paths, encoder, 32, views, 3, 0, "cpu", folder)
        with ranks.alone():
            expected = embed_views(paths, encoder, 32, views, 3, 0, "cpu", folder / f"of_rank_{ranks.rank()}")
        assert torch.equal(shared, expected) and shared.shape == (max(1, views), 8, encoder.width)
        assert expected.std() > 0
    ranks.end()
    return 0


def test_features_are_those_of_one_process(tiny_data, tmp_path):
    ended = run_ranks(tmp_path, 2, embed, tiny_data, tmp_path / "cache")
    assert [end.code for end in ended] == [0, 0], ended[0].err + ended[1].err
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_two_launches_train_no_expert_twice(tiny_argv, tmp_path):
    argv = [*tiny_argv, *QUICK_BUFFER, "--train_epochs", "1", "--num_experts", "3"]
    argv += ["--buffer_path", str(tmp_path / "b")]
    launches = [Ranks(tmp_path / str(i), 1, buffer.main, argv) for i in range(2)]
    ended = [launch.end()[0] for launch in launches]
    assert [end.code for end in ended] == [0, 0]
    saved = [line for end in ended for line in end.out.splitlines() if line.startswith("saved")]
    assert len(saved) == len(set(saved)) == 3
    assert not list((tmp_path / "b").rglob("*.lock"))


def test_a_lock_names_its_holder_and_is_given_back(tmp_path, capsys):
    expert = tmp_path / "expert_000.safetensors"
    with ExpertLocks() as locks, ExpertLocks() as others:
        assert locks.take(expert)
        holder = json.loads((tmp_path / "expert_000.lock").read_text())
        assert holder == {"host": socket.gethostname(), "process": os.getpid()}
        (tmp_path / "expert_000.lock").write_text(json.dumps(holder | {"process": os.getppid()}))
        assert not others.take(expert)
        assert f"process {os.getppid()} of {socket.gethostname()}" in others.elsewhere[expert]
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""
    expert.touch()
    assert not ExpertLocks().take(expert) and os.listdir(tmp_path) == [expert.name]


def test_a_stale_lock_is_taken_over_but_not_another_hosts(tmp_path, capsys):
    expert, lock = tmp_path / "expert_000.safetensors", tmp_path / "expert_000.lock"
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock.write_text(json.dumps({"host": "elsewhere", "process": gone.pid}))
    locks = ExpertLocks()
    assert not locks.take(expert) and "of elsewhere" in locks.elsewhere[expert]
    lock.write_text(json.dumps({"host": socket.gethostname(), "process": gone.pid}))
    assert locks.take(expert)
    assert f"took over expert_000.safetensors from process {gone.pid}" in capsys.readouterr().err
    assert json.loads(lock.read_text())["process"] == os.getpid()
    lock.write_text("{")
    with pytest.raises(InputError, match="is not a lock file"):
        ExpertLocks().take(expert)
    lock.write_text("")  # killed between making and writing it
    assert ExpertLocks().take(expert)


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.experts.locks.json.dumps", full)
    with pytest.raises(InputError, match="No space left on device"):
        ExpertLocks().take(tmp_path / "expert_000.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_beside_finished_experts_is_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for number, (host, process) in enumerate([(socket.gethostname(), gone.pid), ("elsewhere", gone.pid)]):
        (tmp_path / f"expert_{number:03d}.safetensors").touch()
        (tmp_path / f"expert_{number:03d}.lock").write_text(json.dumps({"host": host, "process": process}))
    (tmp_path / f".expert_000.safetensors.{socket.gethostname()}.{gone.pid}.tmp").mkdir()
    (tmp_path / "expert_002.lock").write_text(json.dumps({"host": socket.gethostname(), "process": gone.pid}))
    clear_stale(tmp_path)
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors"}
    assert left == {"expert_001.lock", "expert_002.lock"}  # of another host; of an expert still to be trained


def test_experts_of_another_launch_are_left_to_it(tiny_argv, tmp_path, capsys):
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    (folder / "expert_001.lock").write_text(json.dumps({"host": "elsewhere", "process": 1}))
    argv = [*tiny_argv, *QUICK_BUFFER, "--train_epochs", "1", "--num_experts", "2", "--buffer_path", str(tmp_path)]
    assert buffer.main(argv) == 0
    *_, left, closing = capsys.readouterr().out.splitlines()
    assert left.startswith("expert_001.safetensors is being trained by process 1 of elsewhere")
    assert closing.startswith("1 expert of 1 epoch")


# ---- evaluate.py and coreset.py


def test_the_table_is_that_of_one_process(straight, experts, both, tmp_path):
    """Two candidates and their own rates, three networks, two experts."""
    argv = ["--synset", straight / "best.safetensors", "--num_eval", 3, "--json", "{}.json", "--all_data", experts]
    one, two = both(evaluate, *argv, "--tune_rates", "--grid_img", 0.01, "--grid_txt", 0.1, 0.2)
    assert one == two and one.count("\n| ") == 2 + 2
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()


def test_a_coreset_is_that_of_one_process(tiny_argv, both, tmp_path):
    argv = [*tiny_argv, "--method", "herding", "--num_queries", 5, "--batch_size_test", 5, "--cache_dir", "{}"]
    one, two = both(coreset, *argv, "--save_dir", "{}")
    assert one == two
    one, two = (load_synset(tmp_path / name / "herding_5.safetensors") for name in ("1", "2"))
    assert one.files == two.files and one.scores == two.scores
    assert torch.equal(one.image_syn, two.image_syn)
