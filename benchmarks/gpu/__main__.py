"""Every claim on a card, in one command: writes tables as Markdown and the numbers as JSON.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --toy

Both files are written after each measurement. The same command again carries on where the last one ended, and tries
again what failed; numbers of another card, torch or size are not mixed in. What fails costs its row alone. Nothing is
downloaded: random weights and drawn pictures, which do for speed, memory and agreement. On a CPU, which is for
rehearsing at --toy sizes, what only a card has is left out.
"""

import argparse
import contextlib
import importlib
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.gpu.record import Record
from benchmarks.gpu.setup import TOY, Setup, Sizes
from data.errors import InputError
from utils import cli
from utils.matching import OutOfMemory

OUTER = "Outer iteration, by precision, limit of memory and pairs at a time"
# Name on the command line: table, function of a module beside this one and its options; the most telling first.
# A module is imported when its turn comes, so that one that cannot be costs its sections alone.
SECTIONS = {
    "card": ("The card", "outer.card", {}),
    "published": ("distill.py with the published flags", "scripts.published_command", {}),
    "heads": ("distill.py with heads", "scripts.heads_command", {}),
    "written_out": ("Second derivatives, two steps of 25 pairs in tf32", "outer.written_out", {}),
    "outer": (OUTER, "outer.outer", {"precision": "tf32"}),
    "profile": ("Where the time goes", "profile.where_the_time_goes", {}),
    "expert": ("An expert's step", "training.expert_step", {}),
    "evaluation": ("Evaluation of one network", "training.evaluation", {}),
    "precision": ("Agreement with float64", "outer.precisions", {}),
    "students": ("Other students", "outer.other_students", {}),
    "outer_bf16": (OUTER, "outer.outer", {"precision": "bf16"}),
    "chunks": (OUTER, "outer.outer", {"precision": "tf32", "others": True}),
    "unroll": ("Against a full unroll", "outer.unrolled", {}),
    "released": ("Against a loop as released", "scripts.as_released", {}),
    "outer_fp32": (OUTER, "outer.outer", {"precision": "fp32"}),
    "chunks_bf16": (OUTER, "outer.outer", {"precision": "bf16", "others": True}),
}
ON_CARD_ALONE = ("chunks", "chunks_bf16")  # on a CPU the same as those under limits


class TimeIsUp(Exception):
    """The minutes of the command are over."""


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    started = time.monotonic()
    setup = Setup(find_device(args.device), TOY if args.toy else Sizes(), args.num_workers)
    is_result = setup.on_card and not args.toy
    stem = args.output or (Path("benchmarks") if is_result else Path(tempfile.mkdtemp())) / "RESULTS_gpu"
    record = Record(stem, about(setup, args.toy))
    if record.carried_on:
        print(f"{record.carried_on} measurements are in {stem}.json already")
    for section in args.sections:
        if section in ON_CARD_ALONE and not setup.on_card:
            continue
        measure(section, setup, record, lambda: 60 * args.minutes - (time.monotonic() - started))
    print(f"{time.monotonic() - started:.0f} s; {stem}.md, {stem}.json")


def measure(section: str, setup: Setup, record: Record, seconds_left) -> None:
    """All measurements of a section that are not in the record yet."""
    title, function, options = SECTIONS[section]
    try:
        module, name = function.split(".")
        of_setup = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
        with contextlib.closing(of_setup(setup, **options)) as measurements:
            for name, call in measurements:
                if not record.is_done(title, name):
                    attempt(title, name, call, record, seconds_left())
    except Exception as error:
        record.put_failure(title, section, one_line(error))
    setup.free()


def attempt(title: str, name: str, call, record: Record, seconds: float) -> None:
    """One measurement into the record, whatever becomes of it."""
    started = time.monotonic()
    try:
        with time_limit(seconds):
            rows = call()
        record.put(title, name, rows, time.monotonic() - started)
        outcome = ""
    except TimeIsUp:
        record.put_not_run(title, name, outcome := "no time left; run the command again")
    except (torch.cuda.OutOfMemoryError, OutOfMemory):
        outcome = "out of memory"
        record.put(title, name, {name: {"note": outcome}}, time.monotonic() - started)
    except (Exception, SystemExit) as error:
        record.put_failure(title, name, outcome := one_line(error))
    print(f"{time.monotonic() - started:6.1f} s  {title}: {name}{outcome and ': '}{outcome}", flush=True)


@contextlib.contextmanager
def time_limit(seconds: float):
    """Raises TimeIsUp when the block takes longer, as soon as Python has its turn, or at once if no second is left."""
    if seconds <= 0:
        raise TimeIsUp

    def stop(signum, frame):
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].replace("|", "/")


def find_device(name: str) -> torch.device:
    """With its number, as torch's functions about memory want it. Raises InputError if it is not there."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used ({str(error).splitlines()[0]})") from error


def about(setup: Setup, toy: bool) -> dict:
    """What the numbers belong to, and how to read them."""
    sizes = setup.sizes
    name = torch.cuda.get_device_name(setup.device) if setup.on_card else f"a CPU, {torch.get_num_threads()} thread(s)"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    text = (
        f"On {name}; {versions}. Random weights, drawn pictures. {sizes.encoder} at {sizes.image_size} px, "
        f"{sizes.pairs} pairs in each of {sizes.steps} steps, where nothing else is said; times are medians of "
        f"{sizes.repeats}. A limit is on what torch takes for tensors; the driver's own memory comes on top. Shares of "
        f"the matrix rate count every product that is done, also those that chunks do again."
    )
    title = "What was measured on a card" if setup.on_card and not toy else "A rehearsal: these are no measurements"
    left_out = "" if setup.on_card else " Left out on a CPU: copies, limits of memory, cudnn.benchmark, other chunks."
    return {"title": title, "text": text + left_out}


def parse_args(argv=None):
    about, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.__main__", description=about, formatter_class=formatter)
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure, in this order")
    add("--minutes", type=float, default=9, help="after so many the rest is listed as not run")
    add("--output", type=Path, help="path of the two files without endings; benchmarks/RESULTS_gpu on a card")
    add("--toy", action="store_true", help="tiny networks and sizes, to rehearse the command")
    add("--num_workers", type=int, default=min(16, os.cpu_count() or 1), help="loader processes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
