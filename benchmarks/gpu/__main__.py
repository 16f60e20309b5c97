"""Every claim on a card, in one command: writes tables as Markdown and the numbers as JSON.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --toy

Both files are written after each measurement. The same command again carries on where the last one ended, and tries
again what failed; numbers of another card, torch or size are not mixed in. What fails costs its row alone: sections run
in a child process, and where one dies or its CUDA context breaks, another goes on with the next row. Nothing is
downloaded: random weights and drawn pictures, which do for speed, memory and agreement. On a CPU, which is for
rehearsing at --toy sizes, what only a card has is left out.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.child import BROKEN, SECTIONS, measure_all
from benchmarks.gpu.record import FAILED, Record, outcome
from data.errors import InputError
from utils import cli

BY_NAME_ALONE = ("outer", "outer_bf16", "chunks", "students")
DEFAULT = [section for section in SECTIONS if section not in BY_NAME_ALONE]
PROCESSES = multiprocessing.get_context("spawn")  # a forked process cannot use a card that its parent has asked for
PATIENCE = 60  # seconds beyond the command's minutes until a child that does not stop is killed


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:  # of the children: a killed one leaves its files
        call = Call(args, folder, ends=started + 60 * args.minutes)
        while not call.child_finishes():
            pass
    print(f"{time.monotonic() - started:.0f} s; {call.stem}.md, {call.stem}.json")


class Call:
    """One call of the command. It answers the child that measures and keeps the record; it never touches the card.

    Args:
        args: the command line.
        folder: for temporary files of the children.
        ends: when its minutes are over, in seconds of time.monotonic().

    Attributes:
        stem: path of the record's files without endings.
        section, at: table and name of the section and of the row that the child is at.
        tried: all that has an outcome in this call, which no child begins again.
    """

    def __init__(self, args, folder: str, ends: float):
        self.args, self.folder, self.ends = args, folder, ends
        self.stem, self.record, self.section, self.at, self.tried = None, None, None, None, set()

    def child_finishes(self) -> bool:
        """Runs a child; whether it went through all sections. Else the row it was at has the reason.

        Raises InputError if it could not begin.
        """
        connection, of_child = PROCESSES.Pipe()
        child = PROCESSES.Process(target=measure_all, args=(of_child, self.args, self.folder))
        child.start()
        of_child.close()
        self.at, reason = None, None
        try:
            while connection.poll(max(0, self.seconds_left()) + PATIENCE):
                question, *values = connection.recv()
                connection.send(getattr(self, question)(*values))
            reason = "did not stop when the time was over"
        except (EOFError, ConnectionError):
            child.join()
        finally:  # also after Ctrl-C
            child.kill()
            child.join()
            connection.close()
        if child.exitcode not in (0, BROKEN):
            self.put_end(reason or how_it_ended(child.exitcode))
        return child.exitcode == 0

    def put_end(self, reason: str) -> None:
        if self.at is None:
            raise InputError(f"the process that measures {reason} before it measured anything")
        self.put(*self.at, {FAILED: f"the process {reason}"}, None)

    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    # What a child asks, see measure_all:

    def refuse(self, reason: str) -> None:
        raise InputError(reason)

    def open(self, about: dict, is_result: bool) -> None:
        """Opens the record with the first child; numbers of a card belong to the project, those of a rehearsal not."""
        if self.record is not None:
            return
        default = Path("benchmarks") if is_result else Path(tempfile.mkdtemp())
        self.stem = self.args.output or default / "RESULTS_gpu"
        self.record = Record(self.stem, about)
        if self.record.carried_on:
            print(f"{self.record.carried_on} measurements are in {self.stem}.json already")

    def enter(self, title: str, section: str) -> bool:
        """Whether to begin a section. Between its rows it stands for a row itself."""
        if (title, section) in self.tried:
            return False
        self.record.forget(title, section)
        self.at = self.section = (title, section)
        return True

    def begin(self, title: str, name: str) -> float | None:
        """Seconds that are left for a measurement; None if it is not to be done."""
        if self.record.is_done(title, name) or (title, name) in self.tried:
            return None
        self.at = (title, name)
        return self.seconds_left()

    def put(self, title: str, name: str, result: dict, seconds: float | None) -> None:
        """Keeps what became of a measurement, and prints it; `seconds` is what it took, where that is known."""
        self.tried.add((title, name))
        self.at = self.section
        self.record.put(title, name, result)
        why = outcome(result)
        taken = " " * 8 if seconds is None else f"{seconds:6.1f} s"
        print(f"{taken}  {title}: {name}{why and ': '}{why}", flush=True)


def how_it_ended(code: int) -> str:
    """In words, from a process's exit code, which is minus the signal that killed it."""
    if code >= 0:
        return f"ended with code {code}"
    hint = "; is the host's memory full?" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def parse_args(argv=None):
    about, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=about, formatter_class=formatter)
    add = parser.add_argument
    by_name = f"what to measure, in this order; {', '.join(BY_NAME_ALONE)} only if named"
    add("--sections", nargs="+", choices=SECTIONS, default=DEFAULT, help=by_name)
    add("--minutes", type=float, default=9, help="after so many the rest is listed as not run")
    add("--output", type=Path, help="path of the two files without endings; benchmarks/RESULTS_gpu on a card")
    add("--toy", action="store_true", help="tiny networks and sizes, to rehearse the command")
    add("--num_workers", type=int, default=min(16, os.cpu_count() or 1), help="loader processes")
    add("--device", help="cuda where there is a card, else cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
