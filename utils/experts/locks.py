"""Who trains which expert: a lock file beside the expert's, so that two processes never train the same one."""

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path

from data.errors import InputError
from data.whole import clear_leftovers, is_gone

KILLED_AT_ONCE = 0  # number of a process that was killed before it wrote its own into the lock


class ExpertLocks:
    """The locks that this process holds; as a context manager it gives back what it still has at the end.

    A lock file is created atomically and names the host and the process. One whose process is gone from this host is
    taken over; of another host's process nothing can be known, so its lock holds until somebody removes the file.

    Attributes:
        elsewhere: experts that another process was found to train, and a line that says so.
    """

    def __init__(self):
        self.held: set[Path] = set()
        self.elsewhere: dict[Path, str] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for path in list(self.held):
            self.release(path)

    def take(self, expert: Path) -> bool:
        """Whether this process is to train `expert` now: no other one does, and it is not there yet.

        Raises:
            InputError: the lock file cannot be written.
        """
        path = lock_path(expert)
        while not _create(path, {"host": socket.gethostname(), "process": os.getpid()}):
            holder = _read(path)
            if holder is None:  # given back in this moment
                continue
            if not _is_gone(holder):
                self.elsewhere[expert] = (
                    f"{expert.name} is being trained by process {holder['process']} of {holder['host']}; "
                    f"if that one is gone, remove {path} and run again"
                )
                return False
            if _take_away(path, holder):
                line = f"took over {expert.name} from process {holder['process']}, which is gone"
                print(line, file=sys.stderr)  # of any rank
        self.held.add(expert)
        if expert.exists():  # finished since it was found missing
            self.release(expert)
            return False
        return True

    def release(self, expert: Path) -> None:
        lock_path(expert).unlink(missing_ok=True)
        self.held.discard(expert)


def clear_stale(folder: Path) -> None:
    """Removes what killed processes of this host left in a folder of experts beside those that they had finished."""
    clear_leftovers(folder)
    for path in folder.glob("expert_*.lock"):
        if path.with_suffix(".safetensors").exists() and (holder := _read(path)) and _is_gone(holder):
            with contextlib.suppress(OSError):  # a folder that can only be read
                _take_away(path, holder)


def lock_path(expert: Path) -> Path:
    return expert.with_suffix(".lock")


def _create(path: Path, holder: dict) -> bool:
    """Whether the lock file was not there and is now the holder's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("x")  # O_EXCL: of several processes one makes it
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); give another --buffer_path") from error
    try:
        with file:
            file.write(json.dumps(holder))
    except OSError as error:
        path.unlink(missing_ok=True)  # without a holder it would hold for ever
        raise InputError(f"cannot write {path} ({error.strerror}); give another --buffer_path") from error
    return True


def _read(path: Path) -> dict | None:
    """The holder {host, process} of a lock; None if there is no such file."""
    for _ in range(10):
        try:
            holder = json.loads(path.read_text())
            return {"host": str(holder["host"]), "process": int(holder["process"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.1)  # between making and writing it
    if not path.read_bytes():
        return {"host": socket.gethostname(), "process": KILLED_AT_ONCE}
    raise InputError(f"{path} is not a lock file of buffer.py; remove it")


def _is_gone(holder: dict) -> bool:
    if holder["host"] != socket.gethostname():
        return False
    # A number used again: what this process holds it does not ask for.
    if holder["process"] in (KILLED_AT_ONCE, os.getpid()):
        return True
    return is_gone(holder["process"])


def _take_away(path: Path, holder: dict) -> bool:
    """Whether this process removed the stale lock. Of several that try, one moves the file away.

    What it moved may be a lock that was made after the stale one was taken away by another; it is put back.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.stale")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    was_stale = _read(aside) == holder
    if not was_stale:
        _create(path, _read(aside))
    aside.unlink()
    return was_stale
