"""wandb: one run per folder, also offline and after a crash; every number in metrics.jsonl."""

import os
import shlex
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from data.errors import InputError
from utils.log import Log
from utils.ranks import RankLost

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def folders_to_sync(capsys):
    """What the printed command would upload."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "wandb sync" in line]
    return [Path(folder) for folder in shlex.split(line.split("wandb sync ")[1])]


def wandb_id(folder):
    return (folder / "wandb_run_id").read_text().strip()


def test_resumed_run_continues_its_wandb_run(offline, run_distill, tmp_path, capsys):
    run = tmp_path / "run of mine"
    assert run_distill(run, "--Iteration", 1, "--disabled_wandb=false") == 0
    first, (folder,) = wandb_id(run), folders_to_sync(capsys)
    assert folder.parent == run / "wandb" and list(os.scandir(folder)) and folder.name.endswith(f"-{first}")
    assert run_distill(run, "--Iteration", 2, "--disabled_wandb=false", "--resume") == 0
    assert wandb_id(run) == first
    both = folders_to_sync(capsys)
    assert both[0] == folder and {path.name for path in both} == {
        path.name for path in (run / "wandb").iterdir() if path.name.startswith("offline-run-")
    }
    assert all(list(path.glob(f"run-{first}.wandb")) for path in both)
    assert run_distill(tmp_path / "other", "--Iteration", 0, "--disabled_wandb=false") == 0
    assert wandb_id(tmp_path / "other") != first


KILLED = """
import os, pathlib, signal, sys
from utils.log import Log
log = Log(pathlib.Path(sys.argv[1]), {})
for step in range(2000):
    log({"loss": step}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_wandb_run_goes_on_as_the_same_run(offline, tmp_path):
    """By what wandb's own files say. It writes blocks of 32 kB, so that the last steps before the end are missing."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    # A service of wandb that an earlier test began would still hold the run.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    log = Log(tmp_path, {})
    for step in range(1500, 2010):
        log({"loss": step}, step)
    log.finish()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    killed, resumed = ([*wandb_records(file)] for file in files)
    ids = {record.run.run_id for record in killed + resumed if record.WhichOneof("record_type") == "run"}
    assert ids == {wandb_id(tmp_path)}
    assert wandb_steps(killed) == list(range(len(wandb_steps(killed)))) and len(wandb_steps(killed)) > 100
    assert wandb_steps(resumed) == list(range(1999, 2010))


def wandb_records(path):
    """The whole records of a .wandb file: a log of LevelDB after 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # too few for a head
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part = data[at + 7 : at + 7 + length]
        if len(part) < length or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        whole = part if kind in (FULL, FIRST) else whole + part
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
        at += 7 + length


def wandb_steps(records):
    items = [item for record in records for item in record.history.item]
    return [int(item.value_json) for item in items if "_step" in (item.key, *item.nested_key)]


def test_experts_added_later_continue_the_wandb_run_and_others_do_not(offline, run_buffer, tmp_path):
    quick = "--train_epochs", 1, "--disabled_wandb=false", "--num_experts"
    assert run_buffer(tmp_path, *quick, 1) == 0
    folder = tmp_path / "tiny/test_nfnet/demo"
    first = wandb_id(folder)
    assert run_buffer(tmp_path, *quick, 2) == 0
    assert wandb_id(folder) == first
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert run_buffer(tmp_path, *quick, 1, "--l2", 0.1) == 0
    assert wandb_id(folder) != first


def test_an_error_of_wandb_ends_no_run_and_is_said_once(tmp_path, capsys):
    """The numbers are in metrics.jsonl all the same; of what its user stops, nothing is held back."""

    def broken(*args, **kwargs):
        raise OSError("connection lost\nmore")

    log = Log(tmp_path, {}, disabled_wandb=True)
    log.run = SimpleNamespace(log=broken, finish=broken, settings=SimpleNamespace(mode="online"))
    for step in range(2):
        log({"loss": 1.0}, step=step)
        log.media(step, texts={"a": ["b"]})
    log.finish()
    assert capsys.readouterr().out.splitlines() == [
        "warning: wandb left out, the run goes on (OSError: connection lost)",
        "warning: wandb's pictures and texts left out, the run goes on (OSError: connection lost)",
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    for error in (KeyboardInterrupt, RankLost):
        with pytest.raises(error), log.aside("the page"):
            raise error


def test_a_caption_is_no_part_of_the_dashboards_page(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(wandb, "Html", lambda text: shown.append(text))
    log = Log(tmp_path, {}, disabled_wandb=True)
    log.run = SimpleNamespace(log=lambda *args, **kwargs: None)
    log.media(0, texts={"captions": ["<script>alert(1)</script>", "a & b"]})
    assert shown == ["&lt;script&gt;alert(1)&lt;/script&gt;<br>a &amp; b"]


@pytest.fixture
def started(monkeypatch):
    """Arguments of every wandb.init, and what reaches its runs; a step below the last one is an error."""
    runs = []

    def init(**kwargs):
        logged = []

        def log(values, step):
            last = max((step for run in runs if run.id == run_id for step, _ in run.logged), default=0)
            assert step >= last, f"wandb would ignore step {step} after {last}"
            logged.append((step, values))

        run_id = kwargs["id"] or f"id{len(runs)}"
        settings = SimpleNamespace(mode="online")
        runs.append(
            SimpleNamespace(id=run_id, log=log, logged=logged, settings=settings, finish=lambda: None, kwargs=kwargs)
        )
        return runs[-1]

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", init)
    return runs


def test_steps_that_a_killed_run_logged_already(started, tmp_path):
    """Killed after step 57 with its last line half written, continued from 50."""
    log = Log(tmp_path, {})
    for step in range(58):
        log({"loss": step}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 58, "lo')
    log = Log(tmp_path, {})
    for step in range(50, 61):
        log({"loss": step}, step)
        log.media(step, texts={"Synthetic_Sentences": ["a dog"]})
    log.finish()
    assert [run.id for run in started] == ["id0", "id0"]
    assert all(run.kwargs["resume"] == "allow" for run in started)
    numbers = [step for step, values in started[1].logged if "loss" in values]
    pictures = [step for step, values in started[1].logged if "loss" not in values]
    assert numbers == pictures == [57, 58, 59, 60]  # 57 may not have reached wandb whole
    lines = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    assert len(lines) == 58 + 11


def test_fresh_run_takes_all_steps(started, tmp_path):
    Log(tmp_path, {})({"loss": 1.0}, 9)
    log = Log(tmp_path, {}, fresh=True)
    log({"loss": 1.0}, 0)
    assert [run.id for run in started] == ["id0", "id1"]
    assert [(step, values["loss"]) for step, values in started[1].logged] == [(0, 1.0)]
    assert wandb_id(tmp_path) == "id1"


def test_without_wandb_there_is_no_id(tmp_path):
    Log(tmp_path, {}, disabled_wandb=True)({"loss": 1.0}, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_run_that_cannot_be_continued(started, tmp_path, monkeypatch):
    Log(tmp_path, {})

    def refuse(**kwargs):
        raise wandb.Error(f"run {kwargs['id']} was deleted")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError) as caught:
        Log(tmp_path, {})
    assert "run id0 was deleted" in str(caught.value) and str(tmp_path / "wandb_run_id") in str(caught.value)
