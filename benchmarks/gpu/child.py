"""The process that measures: all sections in turn, each row told to the parent as soon as it is there.

The parent answers questions, which are the public methods of `Call` in __main__.py: it knows what is done already.
"""

import contextlib
import functools
import importlib
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import parent_process
from multiprocessing.connection import Connection

import torch

from benchmarks.gpu.profile import ESTIMATE
from benchmarks.gpu.record import FAILED, TIMELESS
from benchmarks.gpu.setup import TOY, Setup, Sizes
from data.errors import InputError
from utils.matching import OutOfMemory

OUTER = "Outer iteration, by precision, limit of memory and pairs at a time"
# Name on the command line: table, function of a module beside this one and its options; the most telling first.
# A module is imported when its turn comes, so that one that cannot be costs its sections alone.
SECTIONS = {
    "card": ("The card", "outer.card", {}),
    "published": ("distill.py with the published flags", "scripts.published_command", {}),
    "heads": ("distill.py with heads", "scripts.heads_command", {}),
    "written_out": ("Second derivatives, two steps of 25 pairs in tf32", "outer.written_out", {}),
    "expert": ("An expert's step", "training.expert_step", {}),
    "evaluation": ("Evaluation of one network", "training.evaluation", {}),
    "profile": ("Where the time goes", "profile.where_the_time_goes", {}),
    "precision": ("Agreement with float64", "outer.precisions", {}),
    "outer": (OUTER, "outer.outer", {"precision": "tf32"}),
    "outer_bf16": (OUTER, "outer.outer", {"precision": "bf16"}),
    "chunks": (OUTER, "outer.outer", {"precision": "tf32", "others": True}),
    "students": ("Other students", "outer.other_students", {}),
}
ON_CARD_ALONE = ("chunks",)  # on a CPU the same as those under limits
CAPTIONS = {SECTIONS[section][0]: ESTIMATE for section in ("published", "heads", "outer", "students")}
BROKEN = 3  # exit code of a child whose card does nothing more


class TimeIsUp(Exception):
    """The minutes of the command are over."""


def measure_all(connection: Connection, args, folder: str) -> None:
    """The body of the process; `folder` is for its temporary files, which the parent removes."""
    end_with_parent()
    tempfile.tempdir = folder
    ask = functools.partial(ask_parent, connection)
    try:
        device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except InputError as error:
        ask("refuse", str(error))
    setup = Setup(device, TOY if args.toy else Sizes(), args.num_workers)
    ask("open", about(setup, args.toy), setup.on_card and not args.toy)
    for section in args.sections:
        if setup.on_card or section not in ON_CARD_ALONE:
            measure(section, setup, ask)
    sys.stdout.flush()
    os._exit(0)  # all is told; a library that fails at its end must not count as a row's failure


def end_with_parent() -> None:
    """Ends this process as soon as the parent has ended, in whatever way; Ctrl-C is the parent's matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def ask_parent(connection: Connection, question: str, *values):
    """The answer of the parent's method of this name."""
    connection.send((question, *values))
    try:
        return connection.recv()
    except (EOFError, ConnectionError):  # it has ended
        sys.exit(1)


def measure(section: str, setup: Setup, ask) -> None:
    """All measurements of a section that are not in the record yet."""
    title, function, options = SECTIONS[section]
    if not ask("enter", title, section):
        return
    try:
        module, name = function.split(".")
        of_setup = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
        with contextlib.closing(of_setup(setup, **options)) as measurements:
            for name, call in measurements:
                if (seconds := ask("begin", title, name)) is not None:
                    tell(setup, ask, title, name, *attempt(name, call, seconds))
    except Exception as error:
        tell(setup, ask, title, section, {FAILED: one_line(error)}, None)
    setup.free()


def attempt(name: str, call, seconds: float) -> tuple[dict, float]:
    """What became of one measurement, as the record keeps it, and the seconds that it took."""
    started = time.monotonic()
    try:
        with time_limit(seconds):
            result = {"rows": call()}
    except TimeIsUp:
        result = {TIMELESS: "no time left; run the command again"}
    except (torch.cuda.OutOfMemoryError, OutOfMemory):
        result = {"rows": {name: {"note": "out of memory"}}}
    except (Exception, SystemExit) as error:
        result = {FAILED: one_line(error)}
    taken = time.monotonic() - started
    return result | ({"took": round(taken, 1)} if "rows" in result else {}), taken


def tell(setup: Setup, ask, title: str, name: str, result: dict, seconds: float | None) -> None:
    """Has a result kept; after a failure that broke the card's context the process ends."""
    broken = FAILED in result and not still_works(setup.device)
    if broken:
        result = {FAILED: f"{result[FAILED]} (nothing more worked in this process)"}
    ask("put", title, name, result, seconds)
    if broken:
        os._exit(BROKEN)  # what libraries do at a usual end may hang now


def still_works(device: torch.device) -> bool:
    """Whether the device does a small operation; after some errors a card does none in the same process."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except torch.cuda.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


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
    return {"title": title, "text": text + left_out, "captions": CAPTIONS}
