"""Commands as processes that are forked off one which has imported all, and that end when they are told to."""

import contextlib
import functools
import importlib
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # audit events: what a run does to its files
PATIENCE = 240  # seconds until a process that was told to end is killed, and counts as one that hangs

TORCHRUN = 20  # seconds after the end of a rank until the others are told to end, as torchrun does, sooner


@dataclass
class Stop:
    """What ends a run: `signal` after `seconds`, or before its `event`-th operation on files; or too little memory.

    `memory` is in bytes beside what is mapped at the start.
    """

    signal: int | None = None
    seconds: float | None = None
    event: int | None = None
    memory: int | None = None


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, minus the signal that killed it.
        out, err: what it printed.
        seconds: that it took; of one that another's end ended, from then on.
    """

    code: int
    out: str
    err: str
    seconds: float


def run(main: Callable, argv: list[str], folder: Path, printed: Path, ranks: int = 1, stop=None, victim: int = 0):
    """Runs main(argv) as `ranks` processes, ends that of number `victim` as `stop` says; a list of `Ended`.

    Args:
        folder: operations on files within it count as events.
        printed: folder for what the processes print.

    Raises:
        AssertionError: a process hangs, or a run leaves processes behind.
    """
    printed.mkdir(parents=True, exist_ok=True)
    names, keeper = _group(ranks, printed)
    started = time.monotonic()
    pids = {}
    for rank in range(ranks):
        own = names | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        ends, note = stop if rank == victim else None, printed / f"{rank}.told"
        call = functools.partial(_watched, main, argv, folder, ends, note)
        pids[_fork(call, printed / str(rank), own)] = rank
    processes = list(pids)
    if stop and stop.seconds is not None:
        _sleep_or_end(pids, stop.seconds)
        os.kill(processes[victim], stop.signal)  # one that has ended already is not yet waited for
    ended, lost, told = {}, started, False
    while pids:
        for pid in list(pids):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                now = time.monotonic()
                rank, code = pids.pop(pid), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                out, err = ((printed / f"{rank}.{name}").read_text() for name in ("out", "err"))
                ended[rank] = Ended(code, out, err, now - lost)
                lost = now if stop else started
        if ended and not told and time.monotonic() - lost > TORCHRUN:
            told = True
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
        if pids and time.monotonic() - lost > PATIENCE + (stop.seconds or 0 if stop else 0):
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"ranks {sorted(pids.values())} hang")
        time.sleep(0.005)
    if keeper:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)
    _check_orphans(processes)
    return [ended[rank] for rank in range(ranks)]


def warm(modules: list[str]) -> bool:
    """Imports what a run imported, so that those forked from here on need not; says whether that was much."""
    new = [name for name in modules if name not in sys.modules]
    for name in new:
        with contextlib.suppress(Exception):  # some are made by their packages
            importlib.import_module(name)
    return len(new) > 20


def _fork(call: Callable[[], int], printed: Path, names: dict[str, str]) -> int:
    """The number of a process, of a group of its own, that exits with what call() returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # it has done so itself
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            os.dup2(os.open(f"{printed}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        os.environ.update(names)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
        code = call()
        threading._shutdown()  # as at the end of a program: threads are waited for
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)  # main of a script gives a number, or raises SystemExit with one


def _watched(main: Callable, argv: list[str], folder: Path, stop: Stop | None, note: Path) -> int:
    """main(argv), ended by `stop` if that is by an event or by memory; what it took goes to the file `note`."""
    prefix, counted = str(folder), [0]

    def watch(name: str, arguments: tuple) -> None:
        if name in WATCHED and str(arguments[0]).startswith(prefix):
            counted[0] += 1
            if stop and counted[0] == stop.event:
                os.kill(os.getpid(), stop.signal)

    sys.addaudithook(watch)
    before = _mapped("VmSize")
    if stop and stop.memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (before + stop.memory, resource.RLIM_INFINITY))
    code = main(argv)
    if stop is None:
        note.write_text(f"{counted[0]} {max(0, _mapped('VmPeak') - before)}")
        note.with_name("modules").write_text("\n".join(sys.modules))
    return code


def _mapped(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _group(ranks: int, printed: Path) -> tuple[dict[str, str], int | None]:
    """What torchrun tells its processes, and the process that keeps the group's store, as torchrun does."""
    if ranks == 1:
        return {}, None
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def keep() -> int:
        store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        signal.pause()
        return store.port

    names = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    names |= {"TORCHELASTIC_RUN_ID": "kills", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return names, _fork(keep, printed / "store", {})


def _sleep_or_end(pids: dict[int, int], seconds: float) -> None:
    """Sleeps, unless a process ends before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids):
            return
        time.sleep(0.002)


def _check_orphans(groups: list[int]) -> None:
    """Raises AssertionError if a process of these groups is there after 15 seconds; a loader's worker looks every 5."""
    until = time.monotonic() + 15
    left = groups
    while left and time.monotonic() < until:
        left = [group for group in left if _is_there(group)]
        time.sleep(0.05 if left else 0)
    for group in left:
        os.killpg(group, signal.SIGKILL)
    assert not left, "processes are left behind"


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
