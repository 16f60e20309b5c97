"""Files and folders that appear whole or not at all, by way of a name beside theirs."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENDING = ".tmp"


def temporary_beside(path: Path) -> Path:
    """The hidden name beside `path` of what this process is making: it says who does, host and process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{ENDING}")


@contextmanager
def replacing(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """Gives a name in a hidden folder beside `path`; the file that is made there takes its place at the end.

    If that fails, nothing is left and what stood there before remains. A folder, since safetensors makes further names
    beside the one that it is given. What killed processes left beside `path` is removed.

    Args:
        sync: wait until the disk has it, so that it outlives a loss of power: for what took hours.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent)
    folder = temporary_beside(path)
    try:
        folder.mkdir(exist_ok=True)
        yield folder / path.name
        if sync:
            _sync(folder / path.name)
        os.replace(folder / path.name, path)
        if sync:
            _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(folder: str | Path) -> None:
    """Removes what processes of this host were making in `folder` when they were killed."""
    if not Path(folder).is_dir():
        return
    with os.scandir(folder) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(".") and entry.name.endswith(ENDING)]
    for path in left:
        _, of_this_host, process = path.removesuffix(ENDING).rpartition(f".{socket.gethostname()}.")
        if of_this_host and process.isdigit() and is_gone(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def is_gone(process: int) -> bool:
    """Whether no process of this host has that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
