"""Ends runs of buffer.py, distill.py and evaluate.py at random moments, goes on with them, and compares.

    python -m benchmarks.kills --count 1000 --output kills.md

What a run leaves after the same command again must be what one in one piece leaves, bit for bit but for what names the
run. Each line of the table is a command and a way to end it. The trials that are done are kept in a file beside the
table: the command goes on where it stopped. Full disks and read-only folders need the right to mount a tmpfs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.kills.cases import BEFORE, CASES, Case, contents, leftovers, make_data
from benchmarks.kills.processes import Stop, run, warm
from utils.files import save_text

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
WAYS = (*SIGNALS, "memory runs out", "disk is full", "folder is read-only")
ROOM = 64 << 20  # bytes of a tmpfs that is not full
SECONDS = 30  # until all ranks end when one was lost


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks.kills", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--count", type=int, default=100, help="trials in all, dealt to commands and ways in turn")
    add("--seed", type=int, default=0, help="of the moments")
    add("--output", type=Path, required=True, help="the table, in Markdown; trials go to the .jsonl beside it")
    add("--cases", nargs="+", default=[""], help="only commands whose name begins with one of these")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--keep", action="store_true", help="keep the folder of a trial that failed")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)  # a process that is forked off has no threads but one
    ways = [way for way in args.ways if way in SIGNALS or way == WAYS[3] or may_mount()]
    if len(ways) < len(args.ways):
        print("full disks and read-only folders are left out: a tmpfs cannot be mounted")
    cases = [case for case in CASES if case.name.startswith(tuple(args.cases))]
    pairs = [(case, way) for way in ways for case in cases if case.ranks == 1 or way in SIGNALS]
    record = args.output.with_suffix(".jsonl")
    trials = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    with tempfile.TemporaryDirectory(prefix="kills_") as folder:
        bench = Bench(Path(folder))
        for number in range(len(trials), args.count):
            case, way = pairs[number % len(pairs)]
            trial = bench.trial(case, way, random.Random(f"{args.seed} {number}"), args.keep)
            trials.append({"number": number, "case": case.name, "way": way, **trial})
            record.parent.mkdir(parents=True, exist_ok=True)
            with record.open("a") as file:
                file.write(json.dumps(trials[-1]) + "\n")
            save_text(args.output, table(trials))
            if trial["problem"]:
                print(f"trial {number}, {case.name}, {way}, {trial['stop']}: {trial['problem']}", flush=True)
    print(table(trials))
    return int(any(trial["problem"] for trial in trials))


class Bench:
    """Data, experts and the runs in one piece, made when they are first asked for, in `base`."""

    def __init__(self, base: Path):
        self.base, self.whole = base, {}
        run(lambda _: make_data(base), [], base, base / "printed")

    def trial(self, case: Case, way: str, draw: random.Random, keep: bool = False) -> dict:
        """Ends the command, runs it again, compares: the moment, how it ended, and what was wrong or ""."""
        expected, seconds, told = self._in_one_piece(case)
        folder = self.base / "run"
        stop, victim = Stop(), draw.randrange(case.ranks)
        events, memory = told[victim]
        if way in SIGNALS and (draw.random() < 0.5 or not events):
            stop = Stop(SIGNALS[way], seconds=draw.uniform(0.02, seconds))
        elif way in SIGNALS:
            stop = Stop(SIGNALS[way], event=draw.randint(1, events))
        elif way == "memory runs out":
            stop = Stop(memory=int(draw.uniform(0, memory)))
        room = int(draw.uniform(0, size(self.base / case.folder)))
        codes, problem = [], ""
        with mounted(folder, way, room) as make_room:
            try:
                ended = self._run(case, folder, stop, victim)
                codes = [one.code for one in ended]
                check_end(ended, way, victim)
                contents(folder)
                make_room()
                if not case.is_done(folder):
                    again = self._run(case, folder)
                    assert [one.code for one in again] == [0] * case.ranks, f"again: {again[0].err.strip()[-400:]}"
                compare(contents(folder), expected, case)
                assert not leftovers(folder), f"left behind: {', '.join(leftovers(folder))}"
            except AssertionError as error:
                problem = str(error)
                if keep:
                    shutil.copytree(folder, Path(tempfile.mkdtemp(prefix="kills_kept_")) / "run")
        named = {key: value for key, value in asdict(stop).items() if value is not None}
        return {"stop": named | ({"room": room} if way == "disk is full" else {}), "codes": codes, "problem": problem}

    def _run(self, case: Case, folder: Path, stop: Stop | None = None, victim: int = 0) -> list:
        argv = case.argv(self.base, folder)
        return run(case.main, argv, folder, self.base / "printed", case.ranks, stop, victim)

    def _in_one_piece(self, case: Case) -> tuple[dict, float, list]:
        """What the command leaves; its seconds; of each process its operations on files, and bytes beside the first."""
        if case.name not in self.whole:
            for name in (name for name in BEFORE if f"{{base}}/{name}" in case.flags):
                self._in_one_piece(BEFORE[name])
            folder, is_new = self.base / case.folder, True
            while is_new:  # only with all imported it takes the time that it will
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                ended = self._run(case, folder)
                assert [one.code for one in ended] == [0] * case.ranks, f"{case.name}: {ended[0].err[-1000:]}"
                is_new = warm((self.base / "printed/modules").read_text().splitlines()) and case.name not in BEFORE
            told = [(self.base / f"printed/{rank}.told").read_text().split() for rank in range(case.ranks)]
            self.whole[case.name] = contents(folder), ended[0].seconds, [[*map(int, numbers)] for numbers in told]
        return self.whole[case.name]


def check_end(ended: list, way: str, victim: int) -> None:
    """Raises AssertionError if a run that was ended did not end as it should: with one line, but for a dead process."""
    allowed = {"SIGKILL": {0, -9}, "SIGTERM": {0, -15}, "Ctrl-C": {0, 130}}.get(way, {0, 2})
    if way == "memory runs out":
        allowed = {*allowed, -signal.SIGSEGV, -signal.SIGABRT}  # of libraries that do not ask whether they got some
    own = ended[victim]
    if len(ended) > 1 and way == "SIGTERM":
        allowed = {0, 2}
    assert own.code in allowed, f"code {own.code}: {own.err.strip()[-600:]}"
    others = [one for one in ended if one is not own]
    codes = 0, 2, 130, -signal.SIGTERM
    assert all(one.code in codes and one.seconds < SECONDS for one in others), f"others: {others}"
    said = [line for one in ended for line in one.err.splitlines() if "warning" not in line.lower()]
    said = [line for line in said if not line.startswith("took over")]
    wanted = int(any(one.code > 0 for one in ended))
    # A library that aborts says so itself.
    assert len(said) == wanted or own.code == -signal.SIGABRT, f"{len(said)} lines: {' / '.join(said)[-600:]}"


def compare(found: dict, expected: dict, case: Case) -> None:
    """Raises AssertionError if two folders hold other files, or other things in them."""
    assert sorted(found) == sorted(expected), f"files differ: {sorted(set(found) ^ set(expected))}"
    lines = [name for name in found if name.endswith("metrics.jsonl")]
    other = [name for name in found if name not in lines and found[name] != expected[name]]
    # A run that goes on repeats lines, and says again how much trains.
    other += [name for name in lines if not case.lacks_lines and {**found[name], **expected[name]} != found[name]]
    assert not other, f"differ: {', '.join(other)}"


@contextmanager
def mounted(folder: Path, way: str, room: int) -> Iterator:
    """An empty folder: of a full or read-only tmpfs if the way says so; gives a function that makes room in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if way not in WAYS[4:]:
        yield lambda: None
        return
    options = f"size={max(4096, room)}" if way == "disk is full" else f"size={ROOM},ro"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", f"remount,rw,size={ROOM}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", folder]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def size(folder: Path) -> int:
    """Of the files in it, in bytes of whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def table(trials: list[dict]) -> str:
    """A row for each command and way: trials, how many were ended before their end, what was wrong."""
    lines = ["| command | ended by | trials | ended within | problems |", "|---|---|---|---|---|"]
    counts, within, wrong = Counter(), Counter(), Counter()
    for trial in trials:
        key = trial["case"], trial["way"]
        counts[key] += 1
        within[key] += any(trial["codes"]) or not trial["codes"]
        wrong[key] += bool(trial["problem"])
    lines += [f"| {' | '.join(key)} | {n} | {within[key]} | {wrong[key]} |" for key, n in counts.items()]
    lines.append(f"| all | | {len(trials)} | {sum(within.values())} | {sum(wrong.values())} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
